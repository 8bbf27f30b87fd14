"""The ONNX graph under construction: values, constants, names, casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from ..ir.program import Node, Program

Value = oir.Value
CONTRIB = "com.microsoft"
INT32 = oir.DataType.INT32
INT64 = oir.DataType.INT64
FLOAT = oir.DataType.FLOAT
DOUBLE = oir.DataType.DOUBLE
BFLOAT16 = oir.DataType.BFLOAT16
_ANY_DTYPE = {"Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Shape"}
BOOL = oir.DataType.BOOL


@dataclass(frozen=True)
class Options:
    """How to write: see `planish.codegen.onnx.TARGET`."""

    profile: str = "ort"
    activations: str = "float"
    attention: str = "onnx"

    @property
    def contrib(self) -> bool:
        """Whether operators outside the ONNX standard may be used."""
        return self.profile == "ort"


@dataclass
class Builder:
    """Collects nodes and initializers; knows the ONNX value of every program value so far.

    `base` and `module` name the program value that is being translated; nodes made meanwhile
    carry them. `values` maps a program node to its ONNX value, or to a list of them.
    """

    program: Program
    options: Options
    names: dict[Node, str]
    nodes: list[oir.Node] = field(default_factory=list[oir.Node])
    initializers: dict[str, Value] = field(default_factory=dict[str, Value])
    values: dict[Node, Any] = field(default_factory=dict[Node, Any])
    memo: dict[Any, Any] = field(default_factory=dict[Any, Any])
    notes: list[str] = field(default_factory=list[str])
    base: str = ""
    module: str = ""
    _taken: Counter[str] = field(default_factory=Counter[str])

    def op(
        self,
        op_type: str,
        *inputs: Value | None,
        dtype: oir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """One node with one output, of `dtype` or else of the first input's."""
        return self.ops(op_type, inputs, [dtype], domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        dtypes: Sequence[oir.DataType | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """One node with an output for each of `dtypes`; None is the dtype of the first input.

        bfloat16 is computed in float32 and rounded, for onnxruntime's processor kernels lack it.
        """
        if op_type not in _ANY_DTYPE and any(i is not None and i.dtype == BFLOAT16 for i in inputs):
            wide = [self.cast(i, FLOAT) if i and i.dtype == BFLOAT16 else i for i in inputs]
            narrow = [kind or BFLOAT16 for kind in dtypes]
            kinds = [FLOAT if kind == BFLOAT16 else kind for kind in narrow]
            found = self.ops(op_type, wide, kinds, domain, **attributes)
            return [self.cast(*pair) for pair in zip(found, narrow, strict=True)]
        name = self.unique(f"{self.base}/{op_type}")
        node = oir.node(
            op_type,
            _trimmed(inputs),
            {key: value for key, value in attributes.items() if value is not None},
            domain=domain,
            num_outputs=len(dtypes),
            name=name,
            metadata_props={"source_module": self.module} if self.module else None,
        )
        self.nodes.append(node)
        first = next((value for value in inputs if value is not None), None)
        for place, (output, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            output.name = name if place == 0 else f"{name}:{place}"
            known = dtype or (first.dtype if first is not None else None)
            if known is not None:
                output.dtype = known
        return list(node.outputs)

    def unique(self, name: str) -> str:
        """`name`, or `name_1`, ... if it is taken."""
        self._taken[name] += 1
        count = self._taken[name]
        return name if count == 1 else self.unique(f"{name}_{count - 1}")

    def constant(self, value: Any, dtype: oir.DataType | None = None) -> Value:
        """A small constant, stored once: a number, a (nested) list or an array."""
        array = np.asarray(value, dtype=dtype.numpy() if dtype is not None else None)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self.memo:
            kind = oir.DataType.from_numpy(array.dtype)
            name = f"constant/{kind.name.lower()}"
            if array.size <= 6:
                name += "/" + "_".join(f"{item:g}" for item in array.flatten().tolist())
            tensor = oir.Tensor(array, dtype=kind)
            self.memo[key] = self.initializer(name, tensor)
        return self.memo[key]

    def initializer(self, name: str, tensor: Any) -> Value:
        """A stored tensor; its dtype and shape are the tensor's."""
        name = self.unique(name)
        tensor.name = name
        value = Value(
            name=name, shape=tensor.shape, type=oir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value

    def lazy(
        self, name: str, dtype: oir.DataType, shape: Sequence[int], make: Callable[[], Any]
    ) -> Value:
        """A stored tensor that is computed when it is written, and forgotten after."""
        tensor = oir.LazyTensor(make, dtype, oir.Shape(shape), cache=False)
        return self.initializer(name, tensor)

    def ints(self, values: Sequence[int]) -> Value:
        """A constant int64 vector."""
        return self.constant(list(values), INT64)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of an earlier call with the same key, or a new one."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def cast(self, value: Value, dtype: oir.DataType) -> Value:
        """`value` in another dtype; itself where it has it."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, to=dtype)


def _trimmed(inputs: Sequence[Value | None]) -> list[Value | None]:
    """Without the absent inputs at the end: onnxruntime 1.31.1 crashes on some of those."""
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def onnx_dtype(dtype: torch.dtype) -> oir.DataType:
    return from_torch_dtype(dtype)


def meta(node: Node) -> Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def numpy_of(tensor: Tensor) -> np.ndarray:
    """A contiguous array of the tensor's elements."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
