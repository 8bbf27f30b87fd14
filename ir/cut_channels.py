"""Cut channels out of a program: weights, literal sizes and metadata follow; no mask remains.

`cut_channels` takes a set of channel classes (`ChannelMap`) and leaves a program of the same graph
that computes with narrower values. `masked` is the twin that it must equal: the same program with
all weight entries of those channels set to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .axes_walk import walk_sizes
from .channel_map import AttentionHeads, ChannelMap, channel_map
from .cut_graph import CannotCut, LiteralSizes, cannot_cut, kept_sizes, set_argument
from .cut_reads import choose_again, read_less
from .edit import Editor, infer
from .pattern import bound_arguments
from .positional import size_at
from .program import Node, Program

Norms = Literal["kept", "own"]
_ATEN, _OURS = torch.ops.aten, torch.ops.planish
_RMS = {_OURS.rms_norm.default, _ATEN.rms_norm.default}


def cut_channels(
    program: Program,
    dead: Iterable[int],
    *,
    channels: ChannelMap | None = None,
    norms: Norms = "kept",
) -> Program:
    """Cut the classes `dead` (roots of `channels`, a map of this program) in place; returns it.

    norms: where a norm loses channels of the values that it takes statistics of, "kept" divides by
    their number before the cut, so that the program equals `masked`; "own" by the number that is
    left. Raises CannotCut naming the node, its module and why; the program is then as it was.
    """
    wanted = (channels or channel_map(program)).closure(dead)
    made = program.copy()
    cut = _Cut(made, channel_map(made), wanted, norms)
    cut.run()
    program.graph, program.weights = made.graph, made.weights
    return program


class _Cut:
    """One cut of one program."""

    def __init__(
        self, program: Program, channels: ChannelMap, dead: frozenset[int], norms: Norms
    ) -> None:
        self.program, self.channels, self.dead, self.norms = program, channels, dead, norms
        self.editor, self.sizes = Editor(program), walk_sizes(program)
        self.gone = channels.marked(dead)
        self.masks: dict[Node, Any] = {}
        self.entries = channels.dead_entries(dead)

    def run(self) -> None:
        why = self.channels.why_not(self.dead)
        if why:
            raise CannotCut(
                "the channels cannot be cut",
                expected="channels that nothing outside needs",
                found=why,
                fix="cut other channels",
            )
        for node in self.program.graph.nodes:
            self._mask(node)
        for heads in self.channels.attentions:
            self._same_share(heads)
        literals = LiteralSizes(self.masks)
        for node in list(self.program.graph.nodes):
            if node.op == "call_function":
                if self.norms == "kept":
                    self._keep_statistics(node)
                literals.change(node)
                choose_again(self.editor, node, self.masks)
        for node, read in self.channels.bare:
            wanted = self.channels.kept_bare((node, read), self.gone)
            whole = self.channels.values(read) is None
            read_less(self.editor, node, read, wanted, self.masks.get(read), whole)
        self._cut_weights()
        self.editor.sweep()
        self._infer()

    def _mask(self, node: Node) -> None:
        if node.op == "get_attr" and not any(map(LiteralSizes.changes, node.users)):
            return
        masks = self.channels.kept(node, self.gone)
        if not all(bool(mask.all()) for mask in masks):
            several = isinstance(node.meta.get("val"), (tuple, list))
            self.masks[node] = masks if several else masks[0]
            for mask in masks:
                sizes = kept_sizes(mask)
                if sizes is None:
                    raise cannot_cut(node, "its heads or parts would keep different numbers")
                if 0 in sizes:
                    raise cannot_cut(node, "nothing of it would be left")

    def _same_share(self, heads: AttentionHeads) -> None:
        """Query head i reads key head i // groups, so each key head must keep as many of them."""
        queries, keys = ((~self.gone[part]).any(-1) for part in (heads.query, heads.key))
        kept = queries.reshape(len(heads.key), -1).sum(-1)
        if (kept[~keys] > 0).any() or len(set(kept[keys].tolist())) > 1:
            raise cannot_cut(heads.node, "its key heads would serve different numbers of queries")

    # norms

    def _keep_statistics(self, node: Node) -> None:
        if node.target not in _RMS and node.target is not _ATEN.layer_norm.default:
            return
        given = bound_arguments(node)
        source: Any = given.get("x", given.get("input"))
        mask = self.masks.get(source)
        if not isinstance(mask, Tensor):
            return
        sizes = kept_sizes(mask)
        assert sizes is not None
        old, new = mask.shape[-1], sizes[-1]
        if old == new:
            return
        if node.target in _RMS:
            self._keep_rms(node, given, old, new)
        elif node.target is _ATEN.layer_norm.default:
            self._keep_layer_norm(node, given, source, old, new)

    def _keep_rms(self, node: Node, given: dict[str, Any], old: int, new: int) -> None:
        """x / sqrt(S / N + eps) = sqrt(N / N') x / sqrt(S / N' + eps N / N')."""
        factor = math.sqrt(old / new)
        eps = given["eps"]
        if eps is None:
            eps = torch.finfo(torch.float32).eps
        weight, offset = given.get("weight"), float(given.get("offset") or 0.0)
        set_argument(node, "eps", float(eps) * old / new)
        if isinstance(weight, Node) and weight.op == "get_attr" and len(weight.users) == 1:
            name = str(weight.target)
            wide = (self.program.weights[name].double() + offset) * factor - offset
            self.program.weights[name] = wide.to(self.program.weights.dtype(name))
            return
        with self.editor.graph.inserting_after(node):
            scaled = self.editor.graph.call_function(_ATEN.mul.Tensor, (node, factor))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def _keep_layer_norm(
        self, node: Node, given: dict[str, Any], source: Node, old: int, new: int
    ) -> None:
        """Mean and variance over the N channels before the cut, of which N - N' are 0.

        m = S / N; v = (sum (x - m)^2 + (N - N') m^2) / N.
        """
        graph = self.editor.graph
        weight, bias = given["weight"], given["bias"]

        def call(target: Any, *args: Any) -> Node:
            made = graph.call_function(target, args)
            made.meta = {"module": node.meta.get("module", "")}
            return made

        with graph.inserting_before(node):
            total = call(_ATEN.sum.dim_IntList, source, [-1], True)
            mean = call(_ATEN.mul.Tensor, total, 1 / old)
            apart = call(_ATEN.sub.Tensor, source, mean)
            power = call(_ATEN.sum.dim_IntList, call(_ATEN.mul.Tensor, apart, apart), [-1], True)
            missing = call(_ATEN.mul.Tensor, call(_ATEN.mul.Tensor, mean, mean), float(old - new))
            spread = call(_ATEN.mul.Tensor, call(_ATEN.add.Tensor, power, missing), 1 / old)
            root = call(_ATEN.rsqrt.default, call(_ATEN.add.Tensor, spread, given["eps"]))
            made = call(_ATEN.mul.Tensor, apart, root)
            made = made if weight is None else call(_ATEN.mul.Tensor, made, weight)
            made = made if bias is None else call(_ATEN.add.Tensor, made, bias)
        node.replace_all_uses_with(made)
        self.masks[made] = self.masks[node]
        graph.erase_node(node)

    # weights and metadata

    def _cut_weights(self) -> None:
        weights = self.program.weights
        for name, axes in self.entries.items():
            value = weights[name]
            for axis, gone in axes.items():
                if bool(gone.all()):
                    raise CannotCut(f"nothing of {name} would be left", where=name)
                value = value.index_select(axis, (~gone).nonzero().flatten())
            weights[name] = value.contiguous()

    def _infer(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.program.weights:
                name = str(node.target)
                with self.editor.mode:
                    shape, dtype = self.program.weights.shape(name), node.meta["val"].dtype
                    node.meta["val"] = torch.empty(shape, dtype=dtype)
            elif node.op == "call_function":
                try:
                    node.meta["val"] = infer(node, self.editor.mode)
                except Exception as error:  # whatever an operation says to sizes that do not meet
                    told = str(error).strip().splitlines()
                    raise cannot_cut(node, told[0] if told else repr(error)) from error
                self._check(node)

    def _check(self, node: Node) -> None:
        mask = self.masks.get(node)
        if isinstance(mask, Tensor):
            sizes = kept_sizes(mask)
            assert sizes is not None
            for axis, (now, wanted) in enumerate(zip(node.meta["val"].shape, sizes, strict=True)):
                if mask.shape[axis] != wanted and size_at(now, self.sizes) != wanted:
                    raise cannot_cut(node, f"axis {axis} is {now}, but {wanted} channels are kept")


def masked(program: Program, channels: ChannelMap, dead: Iterable[int]) -> Program:
    """A copy whose weight entries of dead channels are 0 (norms' stored offsets are respected:
    the factor becomes 0); encoded weights are decoded."""
    twin = program.copy()
    for name, axes in channels.dead_entries(dead).items():
        weight = twin.weights[name].clone()
        offset = channels.offsets.get(name, 0.0)
        for axis, gone in axes.items():
            weight.index_fill_(axis, gone.nonzero().flatten(), -offset)
        twin.weights[name] = weight
    return twin


__all__ = ["CannotCut", "ChannelMap", "Norms", "channel_map", "cut_channels", "masked"]
