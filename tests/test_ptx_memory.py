"""Memories of the PTX simulator: ranges, bank conflicts, races, copies not waited for, atomics."""

from __future__ import annotations

import pytest
import torch
from planish.ir.errors import WrongInput
from planish.kernels.ptx_execute import (
    EndlessLoop,
    NotWaitedFor,
    OutOfBounds,
    UnsupportedInstruction,
    execute,
    opcodes_not_supported,
)
from ptx_snippets import module, run

WORD = "mad.lo.s64 %rd1, %rd40, 4, %rd50;"
"""%rd1: the thread's word of the first tensor."""


def words(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(4, 1), (8, 2), (16, 4), (128, 32), (132, 1), (0, 1)]
)
def test_bank_conflicts_of_textbook_strides(stride: int, wavefronts: int) -> None:
    body = f"mul.lo.s32 %r1, %r100, {stride}; ld.shared.b32 %r2, [%r1];"
    done = run(body, [], shared=8192)
    assert (done.shared_wavefronts, done.shared_ideal) == (wavefronts, 1)


@pytest.mark.parametrize(
    ("width", "stride", "wavefronts"), [(8, 8, 2), (16, 16, 4), (16, 32, 8), (8, 256, 32)]
)
def test_wide_accesses_are_served_in_parts(width: int, stride: int, wavefronts: int) -> None:
    kind, names = (".b64", "%rd1") if width == 8 else (".v4.b32", "{%r2, %r3, %r4, %r5}")
    done = run(f"mul.lo.s32 %r1, %r100, {stride}; ld.shared{kind} {names}, [%r1];", [], shared=8192)
    assert (done.shared_wavefronts, done.shared_ideal) == (wavefronts, 32 * width // 128)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_of_global_memory(stride: int, sectors: int) -> None:
    x = words(512)
    assert x.data_ptr() % 32 == 0
    done = run(f"mad.lo.s64 %rd1, %rd40, {stride}, %rd50; ld.global.b32 %r1, [%rd1];", [x])
    assert (done.global_load_bytes, done.global_load_sectors) == (128, sectors)
    assert (done.global_store_bytes, done.global_store_sectors) == (0, 0)


def test_a_view_may_be_left_but_not_its_storage() -> None:
    x = words(64)
    body = WORD + "ld.global.b32 %r1, [%rd1+{}]; st.global.b32 [%rd1], %r1;"
    run(body.format(64), [x[16:40]])
    assert x[16:48].tolist() == list(range(32, 64))
    with pytest.raises(OutOfBounds) as caught:
        run(body.format(68), [x[16:40]])
    text = str(caught.value)
    assert "ld.global.b32 %r1, [%rd1+68] (PTX line" in text
    assert "thread 31 (warp 0)" in text and "1 threads load outside every tensor" in text
    assert "256 bytes into a storage of 256 bytes" in text


def test_a_masked_access_is_not_one() -> None:
    x = words(20)
    body = WORD + "setp.lt.u32 %p1, %r100, 20; mov.b32 %r1, 7; @%p1 ld.global.b32 %r1, [%rd1]; "
    out = torch.zeros(32, dtype=torch.int32)
    run(body + "mad.lo.s64 %rd2, %rd40, 4, %rd51; st.global.b32 [%rd2], %r1;", [x, out])
    assert out.tolist() == [*range(20), *[7] * 12]
    with pytest.raises(OutOfBounds, match="12 threads"):
        run(body.replace("@%p1", ""), [x])


@pytest.mark.parametrize("body", [
    "ld.global.b64 %rd2, [%rd50+4];",
    "mul.lo.s32 %r1, %r100, 2; ld.shared.b32 %r2, [%r1];",
    "mul.lo.s32 %r1, %r100, 256; ld.shared.b32 %r2, [%r1];",
    "mov.b32 %r1, -4; st.shared.b32 [%r1], %r1;",
])  # fmt: skip
def test_misaligned_and_wild_addresses(body: str) -> None:
    with pytest.raises(OutOfBounds):
        run(body, [words(64)])


SHARE = """
shl.b32 %r1, %r100, 2; xor.b32 %r2, %r1, {distance};
st.shared.b32 [%r1], %r100;
{between}
ld.shared.b32 %r3, [%r2];
mad.lo.s64 %rd1, %rd40, 4, %rd50; st.global.b32 [%rd1], %r3;
"""


def test_warps_need_a_barrier_between_write_and_read() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    missing = run(SHARE.format(distance=128, between=""), [out], threads=64)
    assert out.tolist() == [*range(32, 64), *range(32)]  # right by luck: the simulator is in step
    assert missing.races == 1 and "st.shared.b32" in missing.race_sites[0]
    assert "against ld.shared.b32" in missing.race_sites[0]
    assert run(SHARE.format(distance=128, between="bar.sync 0;"), [out], threads=64).races == 0
    assert run(SHARE.format(distance=4, between=""), [out], threads=64).races == 0
    assert run(SHARE.format(distance=128, between=""), [out], threads=64, check=False).races == 0


def test_warps_need_a_barrier_between_read_and_overwriting() -> None:
    again = "shl.b32 %r4, %r100, 2; xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5]; {}"
    again += " st.shared.b32 [%r4], 5;"
    assert run(again.format(""), [], threads=64).races == 1
    assert run(again.format("bar.sync 0;"), [], threads=64).races == 0


def test_two_warps_may_write_equal_values_only() -> None:
    write = "and.b32 %r1, %r100, 31; shl.b32 %r1, %r1, 2; st.shared.b32 [%r1], {};"
    assert run(write.format("7"), [], threads=64).races == 0
    assert run(write.format("%r100"), [], threads=64).races == 1
    apart = write.format("1") + "bar.sync 0;" + write.format("%r1")
    assert run(apart, [], threads=64).races == 0


COPY = """
shl.b32 %r1, %r100, 4; mad.lo.s64 %rd1, %rd40, 16, %rd50;
cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.commit_group;
add.s32 %r2, %r1, 1024;
cp.async.cg.shared.global [%r2], [%rd1], 16; cp.async.commit_group;
cp.async.wait_group {wait}; {barrier}
xor.b32 %r3, %r1, {distance}; ld.shared.b32 %r4, [%r3+{offset}];
mad.lo.s64 %rd2, %rd40, 4, %rd51; st.global.b32 [%rd2], %r4;
"""


def copy(**how: int | str) -> tuple[torch.Tensor, int]:
    out = torch.zeros(64, dtype=torch.int32)
    text = COPY.format(**{"wait": 1, "barrier": "bar.sync 0;", "distance": 512, "offset": 0, **how})
    return out, run(text, [words(256), out], threads=64).races


def test_copies_land_group_by_group() -> None:
    out, races = copy()
    assert races == 0
    assert out.tolist() == [4 * (thread ^ 32) for thread in range(64)]
    with pytest.raises(NotWaitedFor, match=r"ld\.shared\.b32 %r4"):
        copy(offset=1024)
    with pytest.raises(NotWaitedFor):
        copy(wait=2)
    assert copy(offset=1024, wait=0)[1] == 0


def test_a_copy_waited_for_is_there_for_its_own_warp_only() -> None:
    assert copy(barrier="", distance=0)[1] == 0
    assert copy(barrier="")[1] == 1


def test_a_copy_fills_what_its_source_lacks_with_zeros() -> None:
    x, out = words(4), torch.full((128,), 9, dtype=torch.int32)
    body = """
    setp.eq.s32 %p1, %r100, 0; selp.b32 %r3, 8, 0, %p1; shl.b32 %r1, %r100, 4;
    cp.async.ca.shared.global [%r1], [%rd50], 16, %r3; cp.async.wait_all;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1]; mad.lo.s64 %rd2, %rd40, 16, %rd51;
    st.global.v4.b32 [%rd2], {%r4, %r5, %r6, %r7};
    """
    run(body, [x, out])
    assert out.tolist() == [0, 1] + [0] * 126


# --- programs of a grid


def test_programs_race_for_global_memory() -> None:
    x = torch.zeros(8, dtype=torch.int32)
    store = "mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r100, 0; "
    same = store + "@%p1 st.global.b32 [%rd50], {};"
    assert run(same.format("5"), [x], grid=(3,)).races == 0
    different = run(same.format("%r1"), [x.zero_()], grid=(3,))
    assert different.races == 2 and "two programs write different values" in different.race_sites[0]
    read = store + "@%p1 ld.global.b32 %r2, [%rd50]; add.s32 %r2, %r2, 1; "
    read += "@%p1 st.global.b32 [%rd50], %r2;"
    chain = run(read, [x.zero_()], grid=(3,))
    assert chain.races and any("reads what an earlier one wrote" in one for one in chain.race_sites)
    own = store + "mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %rd50; "
    own += "@%p1 st.global.b32 [%rd1], %r1; ld.global.b32 %r3, [%rd1];"
    assert run(own, [x], grid=(3,)).races == 0
    over = store + "ld.global.b32 %r2, [%rd50]; setp.eq.s32 %p2, %r1, 2; "
    over += "@%p2 st.global.b32 [%rd50], 9;"
    last = run(over, [x], grid=(3,))
    assert last.races == 1 and "overwrites what an earlier one read" in last.race_sites[0]


def test_an_atomic_between_orders_programs() -> None:
    x, counter = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = """
    setp.eq.s32 %p1, %r100, 0; mov.u32 %r1, %ctaid.x; {before}
    setp.eq.s32 %p2, %r1, 1; @%p2 ld.global.b32 %r5, [%rd50];
    setp.eq.s32 %p3, %r1, 0; @%p3 st.global.b32 [%rd50], 3; {after}
    """
    count = "@%p1 atom.global.gpu.acq_rel.add.u32 %r4, [%rd51], 1;"
    assert run(body.format(before=count, after=count), [x, counter], grid=(2,)).races == 0
    assert counter.item() == 4
    for before, after in (("", ""), (count, ""), ("", count)):
        assert run(body.format(before=before, after=after), [x, counter], grid=(2,)).races == 1


ATOMICS = [
    ("add.u32", torch.int32, 5, 3, 0, 8),
    ("add.f32", torch.float32, 1.5, 0.25, 0, 1.75),
    ("add.f64", torch.float64, 1.5, 0.25, 0, 1.75),
    ("add.u64", torch.int64, 1 << 40, 3, 0, (1 << 40) + 3),
    ("max.s32", torch.int32, -5, 3, 0, 3),
    ("max.u32", torch.int32, -5, 3, 0, -5),
    ("min.s64", torch.int64, -5, 3, 0, -5),
    ("min.u64", torch.int64, -5, 3, 0, 3),
    ("exch.b32", torch.int32, 5, 3, 0, 3),
    ("cas.b32", torch.int32, 5, 5, 9, 9),
    ("cas.b32", torch.int32, 5, 4, 9, 5),
    ("and.b32", torch.int32, 6, 3, 0, 2),
    ("inc.u32", torch.int32, 5, 5, 0, 0),
    ("dec.u32", torch.int32, 0, 5, 0, 5),
]


@pytest.mark.parametrize(("operation", "dtype", "old", "a", "b", "new"), ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomic_operations(operation, dtype, old, a, b, new, space) -> None:
    memory, given = torch.tensor([old], dtype=dtype), torch.tensor([a, b], dtype=dtype)
    out = torch.zeros(2, dtype=dtype)
    size = memory.element_size()
    name, bits = ("%r", "b32") if size == 4 else ("%rd", "b64")
    third = f", {name}3" if operation.startswith("cas") else ""
    shared = space == "shared"
    place = "[%r90]" if shared else "[%rd50]"
    body = f"""
    setp.eq.s32 %p1, %r100, 0; mov.b32 %r90, 16;
    ld.global.{bits} {name}1, [%rd50]; ld.global.{bits} {name}2, [%rd51];
    ld.global.{bits} {name}3, [%rd51+{size}];
    {f"st.shared.{bits} [%r90], {name}1;" if shared else ""}
    @%p1 atom.{space}.gpu.acq_rel.{operation} {name}5, {place}, {name}2{third};
    {f"ld.shared.{bits} {name}6, [%r90];" if shared else f"ld.global.{bits} {name}6, [%rd50];"}
    @%p1 st.global.{bits} [%rd52], {name}5; @%p1 st.global.{bits} [%rd52+{size}], {name}6;
    """
    run(body, [memory, given, out])
    assert out.tolist() == torch.tensor([old, new], dtype=dtype).tolist()


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_atomic_addition_of_pairs_by_every_lane(kind: str, dtype: torch.dtype) -> None:
    total = torch.zeros(2, dtype=dtype)
    one = torch.tensor([1.0, -2.0], dtype=dtype)
    add = f"red.global.gpu.relaxed.add.noftz.{kind} [%rd50], %r1;"
    run("ld.global.b32 %r1, [%rd51];" + add, [total, one])
    assert total.tolist() == [32.0, -64.0]


def test_atomics_of_several_warps_do_not_race_but_plain_reads_do() -> None:
    add = "atom.shared.add.u32 %r1, [global_smem], 1;"
    assert run(add, [], threads=64).races == 0
    assert run(add + "ld.shared.b32 %r2, [global_smem];", [], threads=64).races == 1
    assert run(add + "bar.sync 0; ld.shared.b32 %r2, [global_smem];", [], threads=64).races == 0


# --- flow


def test_threads_diverge_and_meet_again() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    body = """
    mov.b32 %r1, 0; mov.b32 %r2, %r100;
    loop: setp.eq.s32 %p1, %r2, 0; @%p1 bra done;
    add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1; bra loop;
    done: bar.sync 0; add.s32 %r1, %r1, 1000;
    mad.lo.s64 %rd1, %rd40, 4, %rd50; st.global.b32 [%rd1], %r1;
    """
    run(body, [out], threads=64)
    assert out.tolist() == [1000 + n * (n + 1) // 2 for n in range(64)]


def test_a_barrier_waits_for_diverged_threads_and_counts_those_that_ended() -> None:
    body = """
    shl.b32 %r1, %r100, 2; setp.lt.u32 %p1, %r100, 32;
    @%p1 bra first;
    st.shared.b32 [%r1], 5; bar.sync 0; {end}
    first: {barrier} ld.shared.b32 %r2, [%r1+128];
    """
    assert run(body.format(end="ret;", barrier="bar.sync 0;"), [], threads=64).races == 0
    assert (
        run(body.format(end="bra out;", barrier="bar.sync 0;") + "out:", [], threads=64).races == 0
    )
    # the first warp ends without the barrier: it counts as arrived, and its read races
    assert run(body.format(end="ret;", barrier=""), [], threads=64).races == 1


def test_waits_that_nobody_ends_are_found() -> None:
    with pytest.raises(EndlessLoop, match="at most 1000"):
        run("loop: bra loop;", [], limit=1000)
    stuck = "setp.lt.u32 %p1, %r100, 32; @%p1 bra a; bar.sync 1; bra out; a: bar.sync 2; out:"
    with pytest.raises(EndlessLoop, match="barrier that the others do not reach"):
        run(stuck, [], threads=64)


def test_named_barriers_order_their_warps_only() -> None:
    body = """
    shl.b32 %r1, %r100, 2; and.b32 %r1, %r1, 255; setp.lt.u32 %p1, %r100, 64; @!%p1 bra late;
    st.shared.b32 [%r1], %r100; bar.sync 1, 64; xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2];
    late: {}
    """
    assert run(body.format(""), [], threads=96).races == 0
    third = "setp.ge.u32 %p2, %r100, 64; @%p2 st.shared.b32 [%r1+64], 1;"
    assert run(body.format(third), [], threads=96).races > 0


def test_what_cannot_run_is_named() -> None:
    body = "wmma.load.a.sync %r1, [%rd50]; add.rz.f32 %r1, %r2, %r3; add.s32 %r1, %r2, %r3;"
    assert opcodes_not_supported(module(body, 1)) == ["wmma.load.a.sync", "add.rz.f32"]
    with pytest.raises(UnsupportedInstruction, match=r"add\.rz\.f32 %r1"):
        run("add.rz.f32 %r1, %r2, %r3;", [])


def test_arguments_and_threads_are_checked() -> None:
    ptx = module("ret;", 1)
    with pytest.raises(WrongInput, match="fewer arguments"):
        execute(ptx, (1,), [words(1), 2], threads=32, shared=0)
    with pytest.raises(WrongInput, match="whole warps"):
        execute(ptx, (1,), [words(1)], threads=48, shared=0)


def test_every_kind_of_parameter() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    text = """.version 8.8
    .visible .entry k(.param .u64 .ptr .global .align 1 p0, .param .f32 p1, .param .u64 p2,
                      .param .u32 p3, .param .u64 p4) {
    .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [p0]; ld.param.b32 %r1, [p1]; ld.param.b64 %rd2, [p2];
    ld.param.b32 %r2, [p3]; ld.param.b64 %rd3, [p4];
    cvt.u64.u32 %rd4, %r1; cvt.s64.s32 %rd5, %r2;
    st.global.v2.b64 [%rd1], {%rd4, %rd2}; st.global.v2.b64 [%rd1+16], {%rd5, %rd3}; ret; }"""
    execute(text, (1,), [out, 0.1, -(1 << 40), -7], threads=32, shared=0)
    assert out.tolist() == [0x3DCCCCCD, -(1 << 40), -7, 0]


def test_local_memory_and_constant_tables() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    static = ".global .align 4 .b32 table[4] = {10, 20, 30, 40};\n"
    body = """
    .local .align 4 .b8 depot[16];
    mov.b64 %rd1, depot; cvta.local.u64 %rd2, %rd1;
    and.b32 %r1, %r100, 3; mul.wide.u32 %rd3, %r1, 4;
    mov.b64 %rd4, table; add.s64 %rd4, %rd4, %rd3; ld.global.b32 %r2, [%rd4];
    add.s32 %r2, %r2, %r100; add.s64 %rd5, %rd2, %rd3; st.b32 [%rd5], %r2;
    add.s64 %rd6, %rd1, %rd3; ld.local.b32 %r3, [%rd6];
    mad.lo.s64 %rd7, %rd40, 4, %rd50; st.global.b32 [%rd7], %r3;
    """
    run(body, [out], static=static)
    assert out.tolist() == [(n & 3) * 10 + 10 + n for n in range(32)]
