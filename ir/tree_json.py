"""The structure of a call or of a result (a pytree spec) as JSON, read back without imports.

torch's own reader follows names in the file to modules and classes; a saved program is untrusted,
so only containers and types that are registered already are rebuilt. Another one becomes a dict or
a tuple of the same leaves.
"""

from __future__ import annotations

import json
from typing import Any, cast

from torch.utils import _pytree as pytree

from .errors import CorruptFile

_PLAIN = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_IMPORTING = ("collections.defaultdict",)
_LEAF = {"type": None, "context": None, "children_spec": []}


def tree_to_json(spec: pytree.TreeSpec) -> tuple[Any, str]:
    """The JSON form, and a note where a type could not be kept ("" where all were)."""
    try:
        return json.loads(pytree.treespec_dumps(spec))[1], ""
    except (NotImplementedError, TypeError, ValueError) as error:
        flat = {"type": "builtins.tuple", "context": "null"}
        flat["children_spec"] = [_LEAF] * spec.num_leaves  # type: ignore[assignment]
        return flat, f"a structure was saved flat: {str(error).splitlines()[0]}"


def tree_from_json(form: Any, where: str) -> tuple[pytree.TreeSpec, list[str]]:
    """The spec, and the types that were replaced by plain ones. Raises CorruptFile."""
    replaced: list[str] = []
    try:
        safe = _safe(form, replaced)
        return pytree.treespec_loads(json.dumps([1, safe])), replaced
    except (KeyError, TypeError, ValueError, RecursionError, NotImplementedError) as error:
        raise CorruptFile(
            "the structure of the inputs or outputs cannot be read",
            where=where,
            expected="a pytree spec as planish writes it",
            found=repr(error)[:200],
            fix="save the program again",
        ) from error


def _safe(form: Any, replaced: list[str]) -> dict[str, Any]:
    kind, children = form["type"], [_safe(child, replaced) for child in form["children_spec"]]
    if kind is None:
        if children or form["context"] is not None:
            raise ValueError("a leaf with children")
        return dict(_LEAF)
    if not isinstance(kind, str):
        raise TypeError(f"a type named {kind!r}")
    context = form["context"]
    known = kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and kind not in _IMPORTING
    if not known or (isinstance(context, str) and "__enum__" in context):
        replaced.append(kind.rpartition(".")[2])
        kind, context = _plain(context, len(children))
    if kind in ("builtins.dict", "collections.OrderedDict"):
        _check_keys(context, len(children))
    return {"type": kind, "context": context, "children_spec": children}


def _plain(context: Any, count: int) -> tuple[str, str]:
    """The plain container that holds as many leaves: a dict if the context lists its keys."""
    try:
        _check_keys(context, count)
    except (TypeError, ValueError):
        return "builtins.tuple", "null"
    return "builtins.dict", context


def _check_keys(context: Any, count: int) -> None:
    keys = json.loads(context)
    if not isinstance(keys, list) or len(cast("list[Any]", keys)) != count:
        raise ValueError(f"{count} values under the keys {context}")
    if not all(isinstance(key, (str, int)) for key in cast("list[Any]", keys)):
        raise ValueError(f"keys {context}")


__all__ = ["tree_from_json", "tree_to_json"]
