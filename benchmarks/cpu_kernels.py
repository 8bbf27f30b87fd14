"""Time torch's CPU kernels for quantized linears against a float32 linear, interleaved.

    python benchmarks/cpu_kernels.py --threads 1 --tokens 1 128 --shapes 1536x576 49152x576

Every kernel gets float32 activations [M, K] and gives float32 [M, N]; quantizing activations, where
a kernel needs that, is inside its time. The table has the median in microseconds, the speed
against F.linear, and the relative error against the float64 product with the kernel's own
dequantized weight (so a weight's rounding does not count, a kernel's and its activations' do).
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from planish.ir.errors import PlanishError
from planish.ir.formats import AffineInt, Encoded
from planish.ir.layouts import TorchInt4Layout, TorchInt8Layout
from planish.ir.numerics import relative_error
from torch import Tensor

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A kernel ready to run, and the weight [N, K] that it stands for."""

    run: Call
    weight: Tensor


def dense(weight: Tensor) -> Candidate:
    return Candidate(lambda x: F.linear(x, weight), weight)


def dense_onednn_packed(weight: Tensor) -> Candidate:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    op = torch.ops.mkldnn._linear_pointwise
    return Candidate(lambda x: op(x, packed, None, "none", [], ""), weight)


def dense_mkl_packed(weight: Tensor) -> Candidate:
    """What Inductor's freezing makes of a float32 linear."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 1)
    op = torch.ops.mkl._mkl_linear
    return Candidate(lambda x: op(x, packed, weight, None, x.shape[0]), weight)


def dense_bfloat16(weight: Tensor) -> Candidate:
    half = weight.bfloat16()
    return Candidate(lambda x: F.linear(x.bfloat16(), half).float(), half)


def int8_weight_only(weight: Tensor) -> Candidate:
    encoded = AffineInt(8).encode(weight)
    packed, scale = TorchInt8Layout().pack(encoded.codes()), encoded.scale.squeeze(-1)
    return Candidate(lambda x: torch._weight_int8pack_mm(x, packed, scale), encoded.decode())


def int8_weight_only_bfloat16(weight: Tensor) -> Candidate:
    encoded = AffineInt(8).encode(weight.bfloat16())
    packed, scale = TorchInt8Layout().pack(encoded.codes()), encoded.scale.squeeze(-1)
    op = torch._weight_int8pack_mm
    return Candidate(lambda x: op(x.bfloat16(), packed, scale).float(), encoded.decode())


def int8_dequantized_each_call(weight: Tensor) -> Candidate:
    encoded = AffineInt(8).encode(weight)
    packed, scale = TorchInt8Layout().pack(encoded.codes()), encoded.scale.squeeze(-1)
    return Candidate(lambda x: F.linear(x, packed.float()) * scale, encoded.decode())


def int8_per_token_int_mm(weight: Tensor) -> Candidate:
    """int8 x int8 -> int32, activations symmetric per token."""
    encoded = AffineInt(8).encode(weight)
    packed, scale = TorchInt8Layout().pack(encoded.codes()).t(), encoded.scale.squeeze(-1)

    def run(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / 127
        return torch._int_mm((x / step).round_().to(torch.int8), packed).float() * step * scale

    return Candidate(run, encoded.decode())


def int8_per_tensor_onednn(weight: Tensor) -> Candidate:
    """uint8 activations with one scale a tensor, weights prepacked by oneDNN."""
    encoded = AffineInt(8).encode(weight)
    packed = torch.ops.onednn.qlinear_prepack(TorchInt8Layout().pack(encoded.codes()), None)
    scale, zeros = encoded.scale.squeeze(-1), torch.zeros(weight.shape[0], dtype=torch.int32)
    op = torch.ops.onednn.qlinear_pointwise.default

    def run(x: Tensor) -> Tensor:
        low, high = (end.item() for end in torch.aminmax(x))
        step = max((max(high, 0.0) - min(low, 0.0)) / 255, 1e-30)
        zero = round(-min(low, 0.0) / step)
        codes = (x / step).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        return op(
            codes, step, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return Candidate(run, encoded.decode())


def linear_dynamic(engine: str) -> Callable[[Tensor], Candidate]:
    """torch.ops.quantized.linear_dynamic, prepacked by an engine; activations per tensor."""

    def prepare(weight: Tensor) -> Candidate:
        encoded = AffineInt(8).encode(weight)
        scale = encoded.scale.squeeze(-1).double()
        decoded = encoded.decode()
        quantized = torch.quantize_per_channel(
            decoded, scale, torch.zeros_like(scale, dtype=torch.int64), 0, torch.qint8
        )
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        return Candidate(lambda x: torch.ops.quantized.linear_dynamic(x, packed, False), decoded)

    return prepare


def int4_grouped(group_size: int, dtype: torch.dtype) -> Callable[[Tensor], Candidate]:
    def prepare(weight: Tensor) -> Candidate:
        encoded = AffineInt(4, group_size).encode(weight.to(dtype))
        layout = TorchInt4Layout(group_size)
        packed = layout.pack(encoded.codes())
        scales = layout.pack_scales(encoded.scale, None, dtype)
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        rows = weight.shape[0]

        def run(x: Tensor) -> Tensor:
            return op(x.to(dtype), packed, group_size, scales)[:, :rows].float()

        return Candidate(run, encoded.decode())

    return prepare


def int4_dynamic(group_size: int | None) -> Callable[[Tensor], Candidate]:
    """_dyn_quant_matmul_4bit: activations to int8 per token inside the kernel."""

    def prepare(weight: Tensor) -> Candidate:
        rows, length = weight.shape
        scale_dtype = torch.float32 if group_size is None else torch.bfloat16
        encoded: Encoded = AffineInt(4, group_size, scale_dtype=scale_dtype).encode(weight)
        nibbles = encoded.parts["codes"]  # pairs along K, the even one in the low bits, as here
        size = group_size or length
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
            nibbles, encoded.scale, None, size, length, rows
        )
        op = torch.ops.aten._dyn_quant_matmul_4bit
        return Candidate(lambda x: op(x, packed, size, length, rows), encoded.decode())

    return prepare


KERNELS: dict[str, Callable[[Tensor], Candidate]] = {
    "F.linear f32": dense,
    "mkldnn linear f32, packed": dense_onednn_packed,
    "mkl linear f32, packed": dense_mkl_packed,
    "F.linear bf16": dense_bfloat16,
    "_weight_int8pack_mm f32": int8_weight_only,
    "_weight_int8pack_mm bf16": int8_weight_only_bfloat16,
    "int8 to f32, then F.linear": int8_dequantized_each_call,
    "_int_mm, int8 per token": int8_per_token_int_mm,
    "onednn.qlinear_pointwise u8": int8_per_tensor_onednn,
    "linear_dynamic fbgemm": linear_dynamic("x86"),
    "linear_dynamic onednn": linear_dynamic("onednn"),
    "_weight_int4pack_mm g32 f32": int4_grouped(32, torch.float32),
    "_weight_int4pack_mm g64 f32": int4_grouped(64, torch.float32),
    "_weight_int4pack_mm g64 bf16": int4_grouped(64, torch.bfloat16),
    "_dyn_quant_matmul_4bit g32": int4_dynamic(32),
    "_dyn_quant_matmul_4bit channel": int4_dynamic(None),
}


def prepared(weight: Tensor, only: str) -> dict[str, Candidate]:
    """Kernels that take this weight; the others are named with their reason."""
    ready: dict[str, Candidate] = {}
    for name, prepare in KERNELS.items():
        if name != "F.linear f32" and re.search(only, name) is None:
            continue
        try:
            ready[name] = prepare(weight)
            ready[name].run(torch.randn(2, weight.shape[1]))
        except (PlanishError, RuntimeError, NotImplementedError) as error:
            ready.pop(name, None)
            print(f"  left out: {name}: {str(error).splitlines()[0][:80]}")
    return ready


def timed(run: Call, x: Tensor, repeats: int) -> float:
    """Seconds a call; with one thread its processor time, which other processes do not lengthen."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run(x)
    return (clock() - start) / repeats


def compare(ready: dict[str, Candidate], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each kernel; every round runs all of them, the very slow ones but once."""
    times = {name: [timed(candidate.run, x, 1)] for name, candidate in ready.items()}
    repeats = {name: max(1, min(50, int(2e-3 / first))) for name, (first,) in times.items()}
    quick = [name for name, (first,) in times.items() if first < 0.25]
    for turn in range(rounds):
        for name in quick:
            seconds = timed(ready[name].run, x, repeats[name])
            times[name] = [seconds] if turn == 0 else [*times[name], seconds]
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    shapes = ["1536x576", "576x1536", "576x576", "49152x576"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="NxK")
    parser.add_argument("--only", default="", help="a regular expression that names kernels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{options.threads} thread(s), medians of {options.rounds} interleaved rounds")
    for shape in options.shapes:
        rows, length = map(int, shape.split("x"))
        weight = torch.randn(rows, length) / length**0.5
        ready = prepared(weight, options.only)
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
