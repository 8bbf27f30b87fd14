"""Weights that pruning leaves alone unless told otherwise: heads onto the vocabulary, and routers.

Both are found in the data flow: a head's product is an output of the program with a channel for
each row of a looked-up table; a router's product goes, channel by channel, to a choice of the
largest. Few values, and each weighs heavily.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..ir.program import Node
from ..ir.weight_roles import Role

_ATEN = torch.ops.aten
_CHOICES = {_ATEN.topk.default, _ATEN.argmax.default, _ATEN.sort.default, _ATEN.sort.stable}

_VIEWS = {_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default}


def spared(roles: Iterable[Role]) -> dict[str, str]:
    """By weight, why it is left alone."""
    known = list(roles)
    vocabularies = {int(role.value.shape[0]) for role in known if role.tables}
    found: dict[str, str] = {}
    for role in known:
        for product in role.matmuls:
            readers = [user for node in _with_its_channels(product) for user in node.users]
            if any(user.target in _CHOICES for user in readers):
                found[role.name] = "a router: its largest outputs choose"
            elif _channels(product) in vocabularies and any(u.op == "output" for u in readers):
                found[role.name] = "a head onto the vocabulary"
    return found


def _with_its_channels(product: Node) -> Iterator[Node]:
    """The product, and what is computed of it alone, channel by channel: a cast, a softmax."""
    found, channels = [product], _channels(product)
    for node in found:
        yield node
        for user in node.users:
            same = _channels(user) == channels or user.target in _VIEWS  # groups of experts
            if same and _of_one_value(user) and user not in found:
                found.append(user)


def _of_one_value(node: Node) -> bool:
    """Whether all that a node reads beside one value are weights; a residual stream is none."""
    return sum(value.op != "get_attr" for value in node.all_input_nodes) == 1


def _channels(node: Node) -> object:
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else None


__all__ = ["spared"]
