"""Broken copies of PTX: which mistakes a text has a place for, and what is changed."""

from __future__ import annotations

from planish.kernels.ptx_mutants import mutants
from planish.kernels.ptx_parse import parse
from ptx_snippets import module

BODY = """
xor.b32 %r1, %r2, %r3; add.s32 %r4, %r1, 64; ld.shared.b32 %r5, [%r4+16];
xor.b32 %r6, %r2, %r3; st.global.b32 [%rd1], %r6;
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
cp.async.wait_group 1; bar.sync 0;
@%p1 ld.global.b32 %r1, [%rd1]; @!%p2 st.global.b32 [%rd1], %r1; bar.sync 0;
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r3, %r4}, { %r5, %r6, %r7, %r8 },
  { %r9, %r10 }, {%r1, %r2, %r3, %r4};
{ .reg .pred complete;
waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
.loc 1 2 3
@!complete bra.uni waitLoop; }
wgmma.wait_group.sync.aligned 0;
"""


def changed(name: str) -> list[str]:
    """The statements of the mutant that the original lacks, in order."""
    return changed_in(module(BODY, 1), name)


def changed_in(ptx: str, name: str) -> list[str]:
    (mutant,) = [one for one in mutants(ptx) if one.name == name]
    before = [one.text for one in parse(ptx).instructions]
    after = [one.text for one in parse(mutant.ptx).instructions]
    return [text for text in after if text not in before] or [f"{len(before) - len(after)} fewer"]


def test_each_mistake_is_made_in_its_place() -> None:
    names = [mutant.name for mutant in mutants(module(BODY, 1))]
    assert names == [
        "cp.async.wait_group dropped",
        "cp.async.wait_group off by one",
        "bar.sync 1 dropped",
        "bar.sync 2 dropped",
        "every bar.sync dropped",
        "mma operands swapped",
        "swizzle 1 broken (xor to or)",
        "load masks dropped",
        "store masks dropped",
        "mbarrier wait dropped",
        "wgmma.wait_group dropped",
        "wgmma.wait_group off by one",
    ]
    assert changed("cp.async.wait_group dropped") == ["1 fewer"]
    assert changed("cp.async.wait_group off by one") == ["cp.async.wait_group 2"]
    assert changed("bar.sync 2 dropped") == ["1 fewer"]
    assert changed("every bar.sync dropped") == ["2 fewer"]
    (mma,) = changed("mma operands swapped")
    assert "{ %r6, %r5, %r7, %r8 }, { %r9, %r10 }" in mma
    # only the exclusive or that a shared address is made of
    assert changed("swizzle 1 broken (xor to or)") == ["or.b32 %r1, %r2, %r3"]
    assert changed("load masks dropped") == [
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10",
        "ld.global.b32 %r1, [%rd1]",
    ]
    assert changed("store masks dropped") == ["st.global.b32 [%rd1], %r1"]
    assert changed("mbarrier wait dropped") == ["2 fewer"]
    assert changed("wgmma.wait_group off by one") == ["wgmma.wait_group.sync.aligned 1"]


def test_text_without_a_place_has_no_mutants() -> None:
    assert mutants(module("add.s32 %r1, %r2, %r3; st.global.b32 [%rd1], %r1;", 1)) == []


def test_barriers_between_which_nothing_happens_are_one() -> None:
    """Dropping one of two changes nothing; an access, a copy or a label between parts them."""
    text = "bar.sync 0; {} bar.sync 0; st.shared.b32 [%r1], %r2; bar.sync 1;"
    for between, first in (
        ("add.s32 %r1, %r2, %r3;", "bar.sync 1 to 2 dropped"),
        ("ld.shared.b32 %r1, [%r2];", "bar.sync 1 dropped"),
        ("cp.async.wait_group 0;", "bar.sync 1 dropped"),
        ("here:", "bar.sync 1 dropped"),
    ):
        ptx = module(text.format(between), 1)
        names = [one.name for one in mutants(ptx) if "bar.sync" in one.name]
        assert names[0] == first
        assert names[-2:] == ["bar.sync 3 dropped", "every bar.sync dropped"]
    assert changed_in(module(text.format(""), 1), "bar.sync 1 to 2 dropped") == ["2 fewer"]
