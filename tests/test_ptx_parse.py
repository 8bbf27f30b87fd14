"""Reading PTX text."""

from __future__ import annotations

import pytest
from planish.ir.errors import CorruptFile
from planish.kernels.ptx_parse import parse, split

TEXT = """
.version 8.8
.extern .shared .align 16 .b8 global_smem[];
.global .align 4 .b8 table[4] = {1, 2, 3, 255};
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .align 64 .b8 kernel_param_1[128],
    .param .f32 kernel_param_2
)
.reqntid 64
{
    .reg .pred     %p<3>;
    .reg .b32     %r<9>;
    .loc    1 20 4                          // source.py:20:4
$L__BB0_1:                              // a loop
    mov.u32     %r1, %tid.x;
    @!%p1 bra     $L__BB0_1;
    // begin inline asm
    { .reg .pred done; .reg .b32 a, a<2>;
    waitLoop: mov.b32 {a0, a1}, %rd1; mov.b32 a, a1;
    @!done bra.uni waitLoop; @done bra finish;
    finish: }
    { .reg .pred done; waitLoop: @done bra waitLoop; }
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1, %r2 }, { %r3,
      %r4 }, [%r5 + 16], { %r6 };
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], %r2;
    ret;
}
    .section .debug { .b8 1; }
"""


def test_an_entry_function_is_read_whole() -> None:
    program = parse(TEXT)
    assert program.name == "kernel"
    assert program.parameters == (
        ("u64", "kernel_param_0", 0),
        ("b8", "kernel_param_1", 128),
        ("f32", "kernel_param_2", 0),
    )
    assert program.variables["global_smem"] == ("shared", 0, b"")
    assert program.variables["table"] == ("global", 4, bytes([1, 2, 3, 255]))
    opcodes = [instruction.words[0] for instruction in program.instructions]
    assert opcodes == ["mov", "bra", "mov", "mov", "bra", "bra", "bra", "mma", "mbarrier", "ret"]


def test_operands_split_at_top_level_commas_only() -> None:
    (mma,) = [one for one in parse(TEXT).instructions if one.words[0] == "mma"]
    assert mma.operands == ("{ %r1, %r2 }", "{ %r3, %r4 }", "[%r5 + 16]", "{ %r6 }")
    assert split("a, {b, c}, [d, {e}], f") == ["a", "{b, c}", "[d, {e}]", "f"]
    assert split("  ") == []


def test_inline_assembly_keeps_its_labels_and_registers_to_itself() -> None:
    program = parse(TEXT)
    first, second = (name for name in program.labels if name.startswith("waitLoop"))
    assert first != second
    targets = [one.operands[0] for one in program.instructions if one.words[0] == "bra"]
    assert targets == ["$L__BB0_1", first, "finish" + first.removeprefix("waitLoop"), second]
    assert all(target in program.labels for target in targets)
    inside = program.instructions[2].operands[0].strip("{}").split(", ")
    assert all(name in program.registers for name in inside)
    guards = {one.guard for one in program.instructions if one.words[0] == "bra"}
    assert len(guards) == 3


def test_an_instruction_knows_its_line_and_source() -> None:
    move = parse(TEXT).instructions[0]
    assert TEXT.split("\n")[move.line - 1].split() == ["mov.u32", "%r1,", "%tid.x;"]
    assert move.source == "source.py:20:4"
    assert move.place == f"mov.u32 %r1, %tid.x (PTX line {move.line}, source.py:20:4)"


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(CorruptFile, match="entry"):
        parse(".version 8.8\n.func f() { ret; }")
