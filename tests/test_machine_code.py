"""What is counted in machine code: in listings written by hand, and in kernels of known counts."""

from __future__ import annotations

import pytest
import torch
from planish.kernels.aot import compile_launch
from planish.kernels.instruction_kinds import count
from planish.kernels.launch import Config
from planish.kernels.machine_code import (
    MachineCode,
    UnreadableCode,
    gcn,
    inner_loop,
    read_machine_code,
    sass,
)
from planish.kernels.machine_loops import Instruction, natural_loops
from tiny_matmul import SMALL, SPILLING, tiny_launch


def listing(*lines: str) -> str:
    """As cuobjdump prints them, 16 bytes an instruction."""
    return "\n".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines)
    )


def loop_of(*lines: str) -> list[str]:
    code = sass(listing(*lines), "k")
    return [code[place].text for place in sorted(inner_loop(code, nvidia=True).places)]


HMMA = "HMMA.16816.F32 R4, R8.reuse, R2, R4"


def test_the_loop_of_a_backward_branch() -> None:
    lines = ("MOV R1, R2", HMMA, "LDSM.16.M88.4 R8, [R3]", "@!P0 BRA 0x10", "EXIT", "BRA 0x50")
    assert loop_of(*lines) == [HMMA, "LDSM.16.M88.4 R8, [R3]", "BRA 0x10"]


def test_a_loop_without_matrix_instructions_is_not_the_inner_loop() -> None:
    assert loop_of("FFMA R1, R2, R3, R1", "@P0 BRA 0x0", HMMA, "EXIT") == []


def test_of_nested_loops_the_inner_one_counts_though_the_outer_has_more() -> None:
    inner = [HMMA, "@P0 BRA 0x10"]
    lines = ("IADD3 R1, R1, 0x1, RZ", *inner, HMMA, HMMA, "@P1 BRA 0x0", "EXIT")
    assert loop_of(*lines) == [HMMA, "BRA 0x10"]


def test_of_two_loops_the_one_with_more_counts() -> None:
    lines = (HMMA, "@P0 BRA 0x0", HMMA, "FADD R1, R1, R2", HMMA, "@P1 BRA 0x20", "EXIT")
    assert len(loop_of(*lines)) == 4


def test_a_slow_path_behind_the_end_belongs_to_its_loop_and_makes_none() -> None:
    """The wait's retry jumps back into the middle of the loop; the tail is outside."""
    lines = (
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",  # 0x00: head
        "@!P0 BRA 0x70",  # 0x10: to the slow path
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR16], idesc[UR17], UP0",  # 0x20
        "@P1 BRA 0x0",  # 0x30: back
        HMMA,  # 0x40: after the loop
        HMMA,  # 0x50
        "EXIT",  # 0x60
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",  # 0x70: slow path, a loop of its own
        "@!P0 BRA 0x70",  # 0x80
        "BRA 0x20",  # 0x90: backwards over the tail, yet no loop
    )
    found = loop_of(*lines)
    assert len(found) == 7
    assert HMMA not in found


def test_a_branch_with_its_condition_inside_goes_on() -> None:
    """What is jumped over is of the loop, but not of every trip."""
    code = sass(listing("BRA.U !UP0, 0x20", HMMA, "BRA.U UP1, 0x0", "EXIT"), "k")
    assert [i.ends for i in code] == [False, False, False, True]
    assert [loop.places for loop in natural_loops(code)] == [frozenset({0, 1, 2})]
    assert [loop.always for loop in natural_loops(code)] == [frozenset({0, 2})]


def test_instructions_of_several_kinds() -> None:
    opcodes = {
        "LDGSTS.E.BYPASS.LTC128B.128": {"ldgsts", "async copies", "wide loads"},
        "LDGSTS.E.BYPASS.LTC128B.64": {"ldgsts", "async copies"},
        "LDG.E.128.CONSTANT": {"loads", "wide loads"},
        "LDG.E.LTC128B.64": {"loads"},
        "LDG.E.U16": {"loads"},
        "UTMALDG.2D": {"async copies", "tma", "wide loads"},
        "LDGDEPBAR": set(),
        "LDSM.16.M88.4": {"ldsm"},
        "HGMMA.64x128x16.F32": {"mma"},
        "IGMMA.64x128x32.S8.S8": {"int8 mma"},
        "UTCQMMA": {"fp8 mma"},
        "I2FP.F32.S32": {"i2f"},
    }
    for opcode, kinds in opcodes.items():
        found = count([Instruction(opcode, opcode)], nvidia=True)
        assert set(found) == {"instructions", *kinds}, opcode


def test_amd_instructions() -> None:
    opcodes = {
        "v_mfma_f32_32x32x8_f16": {"mma"},
        "v_mfma_f32_32x32x8_bf16_1k": {"mma"},
        "v_mfma_f32_32x32x2_f32": {"mma"},
        "v_mfma_f32_32x32x16_fp8_bf8": {"fp8 mma"},
        "v_mfma_i32_32x32x16_i8": {"int8 mma"},
        "v_wmma_i32_16x16x16_iu8": {"int8 mma"},
        "v_wmma_f32_16x16x16_bf16": {"mma"},
        "v_mfma_f64_16x16x4_f64": {"double mma"},
        "buffer_load_dwordx4": {"loads", "wide loads"},
        "global_load_b64": {"loads"},
        "v_exp_f32_e32": {"mufu"},
    }
    for opcode, kinds in opcodes.items():
        found = count([Instruction(opcode, opcode)], nvidia=False)
        assert set(found) == {"instructions", *kinds}, opcode


def test_a_loop_in_amd_assembly() -> None:
    text = """
k:
\ts_mov_b32 s0, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_f16 v[2:17], v[0:1], v[2:3], v[2:17]
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel k
"""
    code = gcn(text)
    assert inner_loop(code, nvidia=False).places == {1, 2}
    assert code[1].opcode == "v_mfma_f32_32x32x8_f16"
    assert len(code) == 4


def test_what_is_no_listing_is_refused() -> None:
    with pytest.raises(UnreadableCode):
        sass("no kernel here", "k")


def read(arch: str, dtype: torch.dtype, config: Config = SMALL, hints: bool = True) -> MachineCode:
    return read_machine_code(compile_launch(tiny_launch(dtype, config), arch, hints))


# Of a tile of 64 x 128 x 64: mma.sync multiplies 16 x 8 x 16 (int8: 32) in each of four warps,
# wgmma 64 x 128 x 16 at once, and AMD's instructions 32 x 32 x 8 and 16 x 16 x 16.
@pytest.mark.parametrize(
    ("arch", "dtype", "matrix"),
    [
        ("sm_80", torch.float16, {"mma": 64 * 128 * 64 // (16 * 8 * 16) // 4}),
        ("sm_80", torch.int8, {"int8 mma": 64 * 128 * 64 // (16 * 8 * 32) // 4}),
        ("sm_90", torch.float16, {"mma": 64 // 16}),
        ("sm_90", torch.float8_e4m3fn, {"fp8 mma": 64 // 32}),
        ("gfx942", torch.float16, {"mma": 64 * 128 * 64 // (32 * 32 * 8) // 4}),
    ],
)
def test_matrix_instructions_of_a_real_loop(
    arch: str, dtype: torch.dtype, matrix: dict[str, int]
) -> None:
    code = read(arch, dtype)
    assert code.matrix == matrix
    assert code.stack == code.spills == 0
    assert 32 < code.registers < 256
    threads = 256 if arch == "gfx942" else 128
    assert code.loop_counts["wide loads"] == (64 + 128) * 64 * dtype.itemsize // 16 // threads
    assert 0 < len(code.loop) < len(code.code)


def test_spills_are_seen() -> None:
    code = read("sm_80", torch.float16, SPILLING)
    assert code.registers == 255
    assert code.stack > 0
    assert code.spills == code.counts["ldl"] + code.counts["stl"] > 0


def test_without_hints_the_wide_loads_are_gone() -> None:
    code = read("sm_80", torch.float16, hints=False)
    assert "wide loads" not in code.counts
    assert "async copies" not in code.counts
    assert code.counts["loads"] == (64 + 128) * 64 // 128
