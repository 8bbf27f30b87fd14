"""Time products of int8 activations and int8 weights on the CPU: planish, torch, onnxruntime.

    python benchmarks/int8_cpu.py --threads 1 --tokens 1 32 512 --shapes 1536x576 576x1536

Every contestant gets float32 activations [M, K] and gives float32 [M, N]; rounding the activations
is inside its time. Interleaved rounds, medians in microseconds, speed against F.linear, and the
relative error against the float64 product with the same int8 weight (which is that of rounding the
activations: by row, or by tensor). The torch target uses the first; the ONNX target the operators
of the last three for activations by row, by tensor and static.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import torch
from cpu_kernels import KERNELS, Candidate, compare
from onnx import TensorProto, helper, numpy_helper
from planish.ir.formats import AffineInt
from planish.ir.numerics import relative_error
from planish.kernels.linear_affine import pack
from planish.kernels.linear_w8a8_cpu import SPEC as PRODUCT
from planish.kernels.quantize_rows_cpu import SPEC as ROWS
from torch import Tensor

CONTRIB = "com.microsoft"
TORCH = (
    "F.linear f32",
    "_int_mm, int8 per token",
    "onednn.qlinear_pointwise u8",
    "linear_dynamic fbgemm",
    "linear_dynamic onednn",
)


def planish_rows(weight: Tensor) -> Candidate:
    """quantize_rows_cpu and linear_w8a8_cpu, as the torch target runs them."""
    encoded = AffineInt(8).encode(weight)
    packed = pack(encoded)
    product = getattr(torch.ops.planish, PRODUCT.name)
    rows = getattr(torch.ops.planish, ROWS.name)

    def run(x: Tensor) -> Tensor:
        codes, scale = rows(x)
        return product(
            codes, scale, None, packed.codes, packed.scale, None, None, None, *packed.sizes
        )

    return Candidate(run, encoded.decode())


def _session(weight: Tensor, build: Callable[..., None]) -> Candidate:
    encoded = AffineInt(8).encode(weight)
    codes = (encoded.codes().t().contiguous().numpy().astype(np.int16) - 128).astype(np.int8)
    stored = {
        "w": codes,
        "ws": encoded.scale.reshape(-1).numpy(),
        "middle": np.uint8(128),
        "middles": np.array([128], np.uint8),
        "one": np.float32(1),
        "most": np.float32(127),
        "last": np.array([-1], np.int64),
        "static": np.float32(5 / 127),
    }
    nodes: list[object] = []

    def op(kind: str, inputs: str, outputs: str, domain: str = "", **attributes: object) -> None:
        made = helper.make_node(kind, inputs.split(), outputs.split(), domain=domain, **attributes)
        nodes.append(made)

    build(op)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, weight.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    return Candidate(
        lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), encoded.decode()
    )


def ort_rows(weight: Tensor) -> Candidate:
    def build(op: Callable[..., None]) -> None:
        op("Abs", "x", "sizes")
        op("ReduceMax", "sizes last", "largest", keepdims=1)
        op("Div", "largest most", "scale")
        op("Reshape", "scale last", "steps")
        op("Shape", "steps", "count")
        op("Expand", "middles count", "zeros")
        op("QuantizeLinear", "x steps zeros", "codes", axis=0)
        op("MatMulIntegerToFloat", "codes w one ws middle", "sums", CONTRIB)
        op("Mul", "sums scale", "y")

    return _session(weight, build)


def ort_tensor(weight: Tensor) -> Candidate:
    def build(op: Callable[..., None]) -> None:
        op("DynamicQuantizeLinear", "x", "codes scale zero")
        op("MatMulIntegerToFloat", "codes w scale ws zero", "y", CONTRIB)

    return _session(weight, build)


def ort_static(weight: Tensor) -> Candidate:
    def build(op: Callable[..., None]) -> None:
        op("QuantizeLinear", "x static middle", "codes")
        op("MatMulIntegerToFloat", "codes w static ws middle", "y", CONTRIB)

    return _session(weight, build)


OURS = {
    "planish rows + linear_w8a8_cpu": planish_rows,
    "onnxruntime, by row": ort_rows,
    "onnxruntime, by tensor": ort_tensor,
    "onnxruntime, static": ort_static,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    shapes = ["1536x576", "576x1536", "49152x576"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="NxK")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, onnxruntime {ort.__version__}, {options.threads} thread(s)")
    for shape in options.shapes:
        rows, length = map(int, shape.split("x"))
        weight = torch.randn(rows, length) / length**0.5
        ready = {name: KERNELS[name](weight) for name in TORCH}
        ready |= {name: make(weight) for name, make in OURS.items()}
        for tokens in options.tokens:
            x = torch.randn(tokens, length)
            medians = compare(ready, x, options.rounds)
            print(f"\nN={rows} K={length} M={tokens}{'us':>26}{'speed':>9}{'error':>10}")
            for name, seconds in medians.items():
                candidate, speed = ready[name], medians["F.linear f32"] / seconds
                exact = x.double() @ candidate.weight.double().t()
                error = relative_error(exact, candidate.run(x))
                print(f"  {name:34}{seconds * 1e6:10.1f}{speed:9.2f}{error:10.1e}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
