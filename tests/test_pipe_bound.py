"""Bounds: cycles of a loop counted by hand, and the least time of a call."""

from __future__ import annotations

import pytest
import torch
from planish.kernels.aot import compile_launch
from planish.kernels.machine_code import MachineCode, read_machine_code
from planish.kernels.machine_loops import Instruction, Loop
from planish.kernels.peaks import GPUS, ideal_time, intensity
from planish.kernels.pipe_bound import MULTIPROCESSORS, pipe_bound
from planish.kernels.spec import Cost
from tiny_matmul import SMALL, tiny_launch

A100, H100, B200, MI300X = GPUS


def code(arch: str, *opcodes: str, sometimes: Loop = ()) -> MachineCode:
    always = tuple(Instruction(opcode, opcode) for opcode in opcodes)
    zero = dict.fromkeys(
        ("registers", "stack", "spills", "accumulators", "scalars", "scalar_spills", "waves"), 0
    )
    return MachineCode(
        arch=arch,
        code=always,
        counts={},
        loop=(*always, *sometimes),
        loop_counts={},
        always=always,
        **zero,
    )


def test_cycles_by_pipe() -> None:
    """Four warps: 10 multiplications of 2048 in each at 1024 a clock are 80 cycles; two MUFU take
    32 lanes at 16 a clock, four times: 16.
    """
    ten = ["HMMA.16816.F32"] * 10
    others = ["FFMA", "IMAD.WIDE", "PRMT", "MUFU.EX2", "MUFU.EX2", "I2F.S8", "HADD2.F32", "BRA"]
    found = pipe_bound(code("sm_80", *ten, *others), threads=128)
    assert found is not None
    assert found.cycles == {
        "issue": 18,
        "fma": 4,
        "alu": 2,
        "half": 1,
        "special": 16,
        "convert": 8,
        "shared memory": 0,
        "tensor": 80,
    }
    assert (found.limiter, found.share) == ("tensor", 1)
    assert found.rate == pytest.approx(312e12, rel=1e-3)
    assert found.label == "bound, not measured"


def test_shared_memory_by_width() -> None:
    """In passes of 128 bytes: 4, 2, 1, 4, 2, 1, 4, 1, and none for the last."""
    opcodes = (
        "LDSM.16.M88.4",
        "LDSM.16.MT88.2",
        "LDSM.16.M88",
        "LDS.128",
        "STS.64",
        "LDS.U16",
        "LDGSTS.E.BYPASS.LTC128B.128",
        "LDGSTS.E.LTC128B",
        "LDGDEPBAR",
        "HMMA.16816.F32",
    )
    found = pipe_bound(code("sm_80", *opcodes), threads=32)
    assert found is not None
    assert found.cycles["shared memory"] == 19
    assert found.limiter == "shared memory"
    assert found.share == pytest.approx(2 / 19)
    assert found.rate == pytest.approx(2 * 2048 / 19 * 1.41e9 * 108)


def test_warp_groups_multiply_together() -> None:
    """Eight warps are two groups: each multiplies 64 x 128 x 16."""
    found = pipe_bound(code("sm_90", "HGMMA.64x128x16.F32"), threads=256)
    assert found is not None
    assert found.cycles["tensor"] == 2 * 64 * 128 * 16 / 2048


@pytest.mark.parametrize(
    ("opcode", "arch", "cycles"),
    [
        ("HMMA.1688.F32.TF32", "sm_80", 1024 / 512),
        ("IMMA.16832.S8.S8.SAT", "sm_80", 4096 / 2048),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", "sm_90", 64 * 64 * 32 / 4096),
        ("HGMMA.64x64x8.F32.TF32", "sm_90", 64 * 64 * 8 / 1024),
    ],
)
def test_rates_by_type(opcode: str, arch: str, cycles: float) -> None:
    found = pipe_bound(code(arch, opcode), threads=128)
    assert found is not None
    assert found.cycles["tensor"] == (cycles if "G" in opcode.split(".")[0] else 4 * cycles)


def test_what_not_every_trip_runs_does_not_lower_the_bound() -> None:
    rare = tuple(Instruction("MUFU.EX2", "") for _ in range(100))
    plain = pipe_bound(code("sm_80", "HMMA.16816.F32"), threads=128)
    assert plain == pipe_bound(code("sm_80", "HMMA.16816.F32", sometimes=rare), threads=128)


def test_there_is_no_bound_without_figures_or_matrix_instructions() -> None:
    assert pipe_bound(code("sm_120", "HMMA.16816.F32"), threads=128) is None
    assert pipe_bound(code("sm_80", "FFMA"), threads=128) is None


def test_a_real_loop_is_below_the_peak() -> None:
    compiled = compile_launch(tiny_launch(torch.float16, SMALL), "sm_80")
    found = pipe_bound(read_machine_code(compiled), compiled.threads)
    assert found is not None
    assert found.cycles["tensor"] == 64 * 128 * 64 / 1024
    assert found.rate == pytest.approx(found.share * 312e12, rel=1e-3)
    assert found.share <= 1


@pytest.mark.parametrize("gpu", [A100, H100])
def test_clocks_are_those_that_the_peaks_imply(gpu: object) -> None:
    unit = MULTIPROCESSORS[gpu.arch]
    assert 2 * unit.count * unit.clock * unit.tensor["f16"] == pytest.approx(
        gpu.rates["mma"], rel=1e-3
    )


def test_ideal_time_of_a_call() -> None:
    """2.039 GB take a millisecond on the A100, as do 312 billion operations."""
    cost = Cost(nbytes=2_039_000_000, flops=156_000_000_000)
    found = ideal_time(cost, A100, "mma")
    assert found is not None
    assert (found.seconds, found.by) == (pytest.approx(1e-3), "memory")
    twice = ideal_time(Cost(cost.nbytes, 4 * cost.flops), A100, "mma")
    assert twice is not None
    assert (twice.seconds, twice.by) == (pytest.approx(2e-3), "arithmetic")
    assert twice.label == "bound, not measured"
    assert ideal_time(cost, A100, "fp8 mma") is None
    assert intensity(cost) == pytest.approx(76.508, abs=1e-3)
