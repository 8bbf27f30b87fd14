"""Exchange within a warp in the PTX simulator."""

from __future__ import annotations

import pytest
import torch
from ptx_snippets import each, run

LANES = torch.arange(32, dtype=torch.int32)


def shuffled(mode: str, amount: int, clamp: int) -> list[int]:
    """shfl.sync as the PTX manual's pseudo-code has it; minus one where the source is no lane."""
    found = []
    segment, last_of = clamp >> 8 & 31, clamp & 31
    for lane in range(32):
        last, first = (lane & segment) | (last_of & ~segment & 31), lane & segment
        source = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane ^ amount,
            "idx": first | (amount & ~segment & 31),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        found.append(source if inside else -1)
    return found


@pytest.mark.parametrize(
    ("mode", "amount", "clamp"),
    [("bfly", 1, 31), ("bfly", 16, 31), ("idx", 5, 31), ("up", 3, 0), ("down", 2, 31),
     ("bfly", 4, 0x181F), ("idx", 2, 0x181F), ("up", 1, 0x1800), ("down", 3, 0x1C1F)],
)  # fmt: skip
@pytest.mark.parametrize("fixed", [True, False])
def test_shuffles(mode: str, amount: int, clamp: int, fixed: bool) -> None:
    x = torch.randint(0, 1000, (32,), dtype=torch.int32)
    operands = f"{amount}, {clamp}" if fixed else "%r20, %r21"
    text = f"mov.b32 %r20, {amount}; mov.b32 %r21, {clamp};"
    text += f"shfl.sync.{mode}.b32 %r22|%p1, $1, {operands}, -1; selp.b32 $0, %r22, -1, %p1;"
    want = [int(x[s]) if s >= 0 else -1 for s in shuffled(mode, amount, clamp)]
    assert each(text, [x], torch.int32).tolist() == want


def test_a_shuffle_stays_in_its_warp() -> None:
    x = torch.arange(64, dtype=torch.int32)
    got = each("shfl.sync.idx.b32 $0, $1, 3, 31, -1;", [x], torch.int32, threads=64)
    assert got.tolist() == [3] * 32 + [35] * 32


def test_votes() -> None:
    x = (LANES * 5 % 7 == 0).int()
    bits = sum(int(value) << lane for lane, value in enumerate(x.tolist()))
    head = "setp.ne.s32 %p1, $1, 0; "
    ballot = each(head + "vote.sync.ballot.b32 $0, %p1, -1;", [x], torch.int32)
    assert {value & 0xFFFFFFFF for value in ballot.tolist()} == {bits}
    for mode, value, want in (("any", x, 1), ("all", x, 0), ("uni", x, 0), ("all", x * 0 + 1, 1),
                              ("any", x * 0, 0), ("uni", x * 0, 1)):  # fmt: skip
        text = head + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 $0, 1, 0, %p2;"
        assert each(text, [value], torch.int32).unique().tolist() == [want]
    some = each(head + "vote.sync.ballot.b32 $0, !%p1, 0xff;", [x], torch.int32)
    assert some.unique().tolist() == [~bits & 0xFF]


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("operation", ["add", "min", "max", "and", "or", "xor"])
def test_reductions(kind: str, operation: str) -> None:
    if operation in ("and", "or", "xor"):
        kind = "b32"
    x = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(1)).int()
    values = [v if kind == "s32" else v & 0xFFFFFFFF for v in x.tolist()]
    for mask in (0xFFFFFFFF, 0x00FF0F0F):
        some = [v for lane, v in enumerate(values) if mask >> lane & 1]
        want = some[0]
        for value in some[1:]:
            want = {
                "add": want + value,
                "min": min(want, value),
                "max": max(want, value),
                "and": want & value,
                "or": want | value,
                "xor": want ^ value,
            }[operation]
        got = each(f"redux.sync.{operation}.{kind} $0, $1, {mask};", [x], torch.int32)
        assert got[0].item() & 0xFFFFFFFF == want & 0xFFFFFFFF


def test_matches() -> None:
    x = LANES % 5
    got = each("match.any.sync.b32 $0, $1, -1;", [x], torch.int32).tolist()
    for lane in range(32):
        same = sum(1 << other for other in range(32) if other % 5 == lane % 5)
        assert got[lane] & 0xFFFFFFFF == same
    text = "match.all.sync.b32 %r9|%p1, $1, -1; selp.b32 $0, 1, 0, %p1;"
    assert each(text, [x], torch.int32).unique().tolist() == [0]
    assert each(text, [x * 0], torch.int32).unique().tolist() == [1]


def test_active_lanes_and_the_elected_one() -> None:
    text = """
    mov.b32 $0, 7; setp.ge.s32 %p1, $1, 20; @!%p1 bra past;
    activemask.b32 $0;
    past:
    """
    got = each(text, [LANES], torch.int32)
    assert got[:20].unique().tolist() == [7]
    assert {value & 0xFFFFFFFF for value in got[20:].tolist()} == {0xFFF00000}
    text = "elect.sync %r9|%p1, 0xfffffff0; selp.b32 $0, 1, 0, %p1;"
    assert each(text, [LANES], torch.int32).nonzero().tolist() == [[4]]


def test_special_registers() -> None:
    out = torch.zeros(64 * 8, 4, dtype=torch.int32)
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %laneid;
    mov.u32 %r5, %ctaid.z; mad.lo.s32 %r6, %r5, 2, %r2; mad.lo.s32 %r6, %r6, %r3, %r1;
    mov.u32 %r7, %ntid.x; mad.lo.s32 %r6, %r6, %r7, %r100; mad.wide.u32 %rd1, %r6, 16, %rd50;
    st.global.v4.b32 [%rd1], {%r1, %r2, %r5, %r4};
    """
    run(body, [out], threads=64, grid=(2, 2, 2))
    at = torch.arange(512)
    want = [at // 64 % 2, at // 128 % 2, at // 256, at % 32]
    assert torch.equal(out.long(), torch.stack(want, 1))
