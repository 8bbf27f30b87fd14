"""Rung 0: the operation as torch sees it: its declaration, its shape rule, its way through export.

Catches twins that write into their arguments, alias them or guess shapes wrongly, and operators
that export takes apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .ladder_judge import Judgement, as_tuple
from .ladder_problem import Ask, Found, arguments_of, left_out, tried
from .ladder_result import Outcome
from .triton_spec import Arguments, Case, TritonSpec

RUNG = 0

_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""Of torch.library.opcheck; the fourth asks for a gradient, which these operators do not have."""

_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
_SAMPLES = 3


class Closed(torch.nn.Module):
    """A function of named arguments as a module of its tensors; the others are held.

    function: called with all arguments by name. The module's inputs are the tensors among them.
    """

    def __init__(self, function: Any, arguments: Arguments) -> None:
        super().__init__()
        self._function = function
        self._names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        self._held = {n: v for n, v in arguments.items() if not isinstance(v, Tensor)}

    def inputs(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The tensors of the arguments in the order of the module's inputs."""
        return tuple(arguments[name] for name in self._names)

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(**dict(zip(self._names, tensors, strict=True)), **self._held)


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """The declaration of the operator and, on some cases, opcheck and the round trip of export."""
    operator = _registered(spec)
    if operator is None:
        wrong = Judgement(False, f"{spec.operator} is not registered: call define(SPEC)")
        yield tried(spec, RUNG, "registration", "", lambda: (wrong, {}))
        return
    cases = samples(spec, ask)
    if not cases:
        yield left_out(spec, RUNG, "opcheck", "no case was asked for")
    for case in cases:
        what = f"opcheck of {case.name}"
        yield tried(spec, RUNG, what, "", lambda case=case: _opcheck(operator, case))
    for case in cases[:1]:
        what = f"torch.export of {case.name}"
        yield tried(spec, RUNG, what, "", lambda case=case: _exported(operator, case))


def samples(spec: TritonSpec, ask: Ask, most: int = _SAMPLES) -> list[Case]:
    """A few cases asked for that differ in dtypes or in which arguments are given."""
    found: dict[Any, Case] = {}
    for case in spec.cases:
        if ask.wants(case.name):
            found.setdefault(_shape_of_call(arguments_of(case)), case)
    return list(found.values())[:most]


def _shape_of_call(arguments: Arguments) -> tuple[Any, ...]:
    return tuple(
        (name, str(value.dtype) if isinstance(value, Tensor) else value is None)
        for name, value in arguments.items()
    )


def _registered(spec: TritonSpec) -> Any:
    namespace, name = spec.operator.split("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default


def _opcheck(operator: Any, case: Case) -> Found:
    arguments = dict(arguments_of(case))
    narrow = any(isinstance(v, Tensor) and v.dtype in _NARROW for v in arguments.values())
    checks = _CHECKS[1:] if narrow else _CHECKS
    results: Mapping[str, str] = torch.library.opcheck(
        operator, (), arguments, test_utils=checks, raise_exception=False
    )
    failed = [f"{name}: {text}" for name, text in results.items() if text != "SUCCESS"]
    sentence = " ".join("; ".join(failed).split())[:400]
    left = ", without test_schema, which cannot compare fp8 on the CPU" if narrow else ""
    return Judgement(not failed, sentence or ", ".join(results) + left), {}


def _exported(operator: Any, case: Case) -> Found:
    arguments = arguments_of(case)
    module = Closed(operator, arguments)
    inputs = module.inputs(arguments)
    exported = torch.export.export(module, inputs, strict=False)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    kept = [target for target in calls if target is operator]
    others = sorted({str(t) for t in calls if t is not operator and "getitem" not in str(t)})
    if len(kept) != 1 or others:
        return Judgement(False, f"exported as {len(kept)} nodes of it and {others}"), {}
    want, have = as_tuple(operator(**arguments)), as_tuple(exported.module()(*inputs))
    equal = all(_equal(a, b) for a, b in zip(want, have, strict=True))
    text = "one node, equal to eager" if equal else "the exported program computes something else"
    return Judgement(equal, text), {}


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(one.double().nan_to_num(7.0), other.double().nan_to_num(7.0))
