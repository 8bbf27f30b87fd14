"""Barriers in shared memory, tensor maps and bulk copies of the PTX simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planish.kernels.ptx_execute import EndlessLoop, NotWaitedFor, OutOfBounds, SimulationError
from planish.kernels.ptx_mutants import mutants
from planish.kernels.ptx_tensormap import TensorMap
from ptx_kernels import compiled, product, simulate
from ptx_snippets import run

PROGRAM = """
mov.b32 %r1, 2048; setp.eq.s32 %p1, %r100, 0; shl.b32 %r3, %r100, 2;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; {init}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {announced};
mov.b32 %r2, 0;
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd50], 256, [%r1];
{wait}
ld.shared.b32 %r4, [%r3]; add.s32 %r4, %r4, 1000; {before}
st.shared.b32 [%r3+1024], %r4; {fence} bar.sync 0; mov.b32 %r5, 1024;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd51], [%r5], 256;
@%p1 cp.async.bulk.commit_group; {last}
@%p1 cp.async.bulk.wait_group.read 0;
"""
WAIT = """{ .reg .pred done; mov.b32 %r9, 0;
again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], %r9; @!done bra.uni again; }"""
USUAL = {
    "init": "fence.proxy.async.shared::cta; bar.sync 0;",
    "announced": 256,
    "wait": WAIT,
    "before": "",
    "fence": "fence.proxy.async.shared::cta;",
    "last": "",
}


def bulk(**changes: int | str) -> tuple[list[int], int]:
    """What comes out, and the races."""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    done = run(PROGRAM.format(**{**USUAL, **changes}), [x, out], threads=64)
    return out.tolist(), done.races


def test_bytes_come_and_go_in_bulk() -> None:
    assert bulk() == ([1000 + n for n in range(64)], 0)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"wait": ""}, NotWaitedFor, "not waited for"),
        ({"announced": 512}, EndlessLoop, "nobody will end"),
        ({"init": "bar.sync 0;"}, NotWaitedFor, "initialisation"),
        ({"fence": ""}, NotWaitedFor, "asynchronous engine"),
        ({"last": "st.shared.b32 [%r3+1024], 0;"}, NotWaitedFor, "overwritten"),
        ({"wait": WAIT.replace("%r9, 0", "%r9, 1")}, EndlessLoop, "nobody will end"),
        ({"wait": WAIT.replace("%r1]", "%r1+8]")}, NotWaitedFor, "not initialised"),
    ],
)
def test_missing_waits_and_fences(changes: dict[str, int | str], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        bulk(**changes)


def test_barriers_race_with_their_making() -> None:
    assert bulk(init="fence.proxy.async.shared::cta;")[1] > 0


def test_a_load_must_not_overwrite_what_others_still_read() -> None:
    read = "bar.sync 0; ld.shared.b32 %r7, [%r3]; {} mov.b32 %r2, 0;"
    text = PROGRAM.format(**USUAL)
    x = torch.arange(64, dtype=torch.int32)
    for barrier, races in (("", True), ("bar.sync 0;", False)):
        broken = text.replace("mov.b32 %r2, 0;", read.format(barrier))
        assert bool(run(broken, [x, torch.zeros_like(x)], threads=64).races) == races


def test_a_program_must_not_end_before_its_stores_are_read() -> None:
    text = PROGRAM.format(**USUAL).replace("@%p1 cp.async.bulk.wait_group.read 0;", "")
    x = torch.arange(64, dtype=torch.int32)
    with pytest.raises(NotWaitedFor, match="program ends"):
        run(text, [x, torch.zeros_like(x)], threads=64)


def test_producers_and_consumers_hand_over_by_barriers() -> None:
    body = """
    shl.b32 %r3, %r100, 2; and.b32 %r3, %r3, 127; mov.b32 %r1, 2048; setp.eq.s32 %p1, %r100, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 32; bar.sync 0; setp.lt.u32 %p2, %r100, 32;
    @%p2 bra producer;
    mov.b32 %r9, 0;
    again: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], %r9; @!%p3 bra again;
    ld.shared.b32 %r4, [%r3]; mad.lo.s64 %rd1, %rd40, 4, %rd50; st.global.b32 [%rd1], %r4;
    bra out;
    producer: add.s32 %r5, %r100, 7; st.shared.b32 [%r3], %r5;
    {arrive}
    out:
    """
    out = torch.zeros(64, dtype=torch.int32)
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r1];"
    done = run(body.format(arrive=arrive), [out], threads=64)
    assert done.races == 0
    assert out[32:].tolist() == list(range(7, 39))
    with pytest.raises(EndlessLoop, match="others do not reach"):
        run(body.format(arrive=""), [out], threads=64)


def test_a_tile_of_a_tensor_map_by_hand() -> None:
    tile = TensorMap(4096, (5, 3), (32,), (4, 2), 2, 0)
    address, inside, offsets = tile.tile((2, 2))
    first = 4096 + 2 * 32 + 2 * 2
    assert address.tolist() == [*range(first, first + 8, 2), *range(first + 32, first + 40, 2)]
    assert inside.tolist() == [True] * 3 + [False] * 5
    assert offsets.tolist() == list(range(0, 16, 2))
    swizzled = TensorMap(0, (64, 8), (128,), (64, 8), 2, 7)
    mixed = swizzled.swizzled(1024, np.arange(0, 1024, 16))
    assert sorted(mixed.tolist()) == list(range(1024, 2048, 16))
    assert mixed[8] == 1024 + 128 + 16 and mixed[9] == 1024 + 128  # row 1: pieces 0 and 1 exchanged


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_products_by_descriptors(arch: str, dtype: torch.dtype) -> None:
    launch, want = product(dtype, (70, 72, 96), (64, 64, 32), described=True)
    done = simulate(launch, arch)
    error = (launch.args["C"].double() - want).abs().max() / want.abs().max()
    assert float(error) < 2.0**-9
    assert done.races == 0
    assert any(opcode.startswith("cp.async.bulk.tensor.2d.shared") for opcode in done.opcodes)


@pytest.mark.slow
def test_broken_copies_of_a_product_by_descriptors() -> None:
    launch, want = product(torch.float16, (70, 72, 160), (64, 64, 32), described=True)
    whole = simulate(launch, "sm_90")
    caught = set[str]()
    for copy in mutants(compiled(launch, "sm_90").ptx):
        try:
            done = simulate(launch, "sm_90", copy.ptx, limit=whole.instructions)
            error = (launch.args["C"].double() - want).abs().max() / want.abs().max()
            if done.races or not float(error) < 2.0**-9:
                caught.add(copy.name)
        except SimulationError:
            caught.add(copy.name)
    # Triton puts two or three barriers in a row here, so that most can go one at a time
    assert {
        "mbarrier wait dropped",
        "wgmma.wait_group dropped",
        "wgmma.wait_group off by one",
        "cp.async.bulk.wait_group dropped",
        "fence.proxy.async dropped",
        "swizzle 1 broken (xor to or)",
        "wgmma operands swapped",
    } <= caught
    assert any(name.startswith("bar.sync") for name in caught)


def test_strides_that_the_copy_engine_refuses() -> None:
    launch, _ = product(torch.float16, (64, 60, 64), (64, 64, 32), described=True)
    with pytest.raises(OutOfBounds, match="copy engine refuses"):
        simulate(launch, "sm_90")
