"""A model that passes on whatever it is called with: its call's arguments, given names.

torch.export finds the free axes of an input by the name of its parameter, and `*args, **kwargs`
(a wrapper around the model that is meant, such as an adapter's) has none.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from inspect import Parameter
from typing import Any

from torch import nn


@contextlib.contextmanager
def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Generator[None]:
    """Within, the model's forward has a parameter for each of these arguments.

    A forward that names them itself is left alone.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    gathers = len(named) < len(list(parameters))
    if not gathers or (set(kwargs) <= named and len(args) <= len(named)):
        yield
        return
    forward = model.forward

    def passing(*given: Any, **by_name: Any) -> Any:
        return forward(*given, **by_name)

    known = [p.name for p in parameters if p.name in named]
    places = [*known, *(f"argument_{place}" for place in range(len(known), len(args)))]
    names = dict.fromkeys([*places[: len(args)], *kwargs])
    form = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    passing.__signature__ = inspect.Signature(form)  # type: ignore[attr-defined]
    own = "forward" in vars(model)
    model.forward = passing
    try:
        yield
    finally:
        del model.forward
        if own:
            model.forward = forward
