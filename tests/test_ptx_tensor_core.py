"""Matrix instructions of the PTX simulator, element by element as the PTX manual draws them."""

from __future__ import annotations

import pytest
import torch
from planish.kernels.ptx_execute import NotWaitedFor, OutOfBounds
from planish.kernels.ptx_warpgroup import descriptor_index
from ptx_snippets import run
from torch import Tensor

SEED = torch.Generator().manual_seed(9)
WIDTH = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}
TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "s8": torch.int8,
    "u8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def matrix(kind: str, *shape: int) -> Tensor:
    if kind in ("s8", "u8"):
        low = -128 if kind == "s8" else 0
        return torch.randint(low, low + 256, shape, generator=SEED).to(TORCH[kind])
    values = torch.randn(shape, generator=SEED).to(TORCH[kind])
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32" else values


def loads(names: list[str], pointer: str) -> str:
    """Each thread's words of a tensor [threads, names] into registers."""
    text = f"mad.lo.s64 %rd1, %rd40, {4 * len(names)}, {pointer};"
    return text + "".join(f"ld.global.b32 {name}, [%rd1+{4 * i}];" for i, name in enumerate(names))


def stores(names: list[str], pointer: str) -> str:
    text = f"mad.lo.s64 %rd1, %rd40, {4 * len(names)}, {pointer};"
    return text + "".join(f"st.global.b32 [%rd1+{4 * i}], {name};" for i, name in enumerate(names))


def a_place(lane: int, register: int, part: int, per: int, depth: int) -> tuple[int, int]:
    """Row and column of an element of A (PTX ISA, figures of mma.m16n8k*)."""
    row = lane // 4 + 8 * (register % 2)
    return row, lane % 4 * per + part + depth // 2 * (register // 2)


def b_place(lane: int, register: int, part: int, per: int, depth: int) -> tuple[int, int]:
    return lane % 4 * per + part + depth // 2 * register, lane // 4


def c_place(lane: int, register: int) -> tuple[int, int]:
    return lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2


@pytest.mark.parametrize(
    ("kind", "depth", "out"),
    [("f16", 16, "f32"), ("f16", 8, "f32"), ("bf16", 16, "f32"), ("tf32", 8, "f32"),
     ("s8", 32, "s32"), ("u8", 32, "s32"), ("e4m3", 32, "f32"), ("e5m2", 32, "f32")],
)  # fmt: skip
def test_fragments_of_mma(kind: str, depth: int, out: str) -> None:
    per = 4 // WIDTH[kind]
    a, b = matrix(kind, 16, depth), matrix(kind, depth, 8)
    registers = (16 * depth // 32 // per, 8 * depth // 32 // per)
    steps = registers[1]
    a_words = torch.zeros(32, registers[0], per, dtype=a.dtype)
    b_words = torch.zeros(32, registers[1], per, dtype=b.dtype)
    for lane in range(32):
        for part in range(per):
            for register in range(registers[0]):
                row, column = a_place(lane, register, part, per, depth if steps == 2 else 0)
                a_words[lane, register, part] = a[row, column]
            for register in range(registers[1]):
                row, column = b_place(lane, register, part, per, depth if steps == 2 else 0)
                b_words[lane, register, part] = b[row, column]
    c = torch.randint(-9, 9, (16, 8), generator=SEED)
    c = c.int() if out == "s32" else c.float()
    places = [[c_place(lane, register) for register in range(4)] for lane in range(32)]
    c_words = torch.stack([torch.stack([c[place] for place in row]) for row in places])
    a_names = [f"%r{10 + i}" for i in range(registers[0])]
    b_names = [f"%r{20 + i}" for i in range(registers[1])]
    c_names = [f"%r{30 + i}" for i in range(4)]
    shape = f"m16n8k{depth}.row.col.{out}.{kind}.{kind}.{out}"
    body = loads(a_names, "%rd50") + loads(b_names, "%rd51") + loads(c_names, "%rd52")
    groups = [f"{{{', '.join(names)}}}" for names in (c_names, a_names, b_names, c_names)]
    body += f"mma.sync.aligned.{shape} {', '.join(groups)};" + stores(c_names, "%rd53")
    d = torch.zeros_like(c_words)
    views = [words.contiguous().view(torch.int32) for words in (a_words, b_words, c_words)]
    done = run(body, [*views, d])
    assert done.matrix_instructions == 1
    want = a.double() @ b.double() + c.double()
    for lane in range(32):
        for register in range(4):
            got, exact = d[lane, register].double(), want[c_place(lane, register)]
            assert torch.isclose(got, exact, rtol=2.0**-20, atol=2.0**-20 * float(want.abs().max()))


def test_tf32_loses_the_low_bits_and_int8_saturates() -> None:
    one, tail = torch.full((32, 4), 1.0), torch.full((32, 2), 1.0 + 2.0**-20)
    names = [f"%r{i}" for i in range(10, 16)]
    text = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4},"
    text += "{%r10,%r11,%r12,%r13},{%r14,%r15},{%r5,%r5,%r5,%r5};"
    body = loads(names[:4], "%rd50") + loads(names[4:], "%rd51") + "mov.b32 %r5, 0;" + text
    d = torch.zeros(32, 4)
    run(body + stores(["%r1", "%r2", "%r3", "%r4"], "%rd52"), [one, tail, d])
    assert d.unique().tolist() == [8.0]
    big = torch.full((32, 1), 2**31 - 5, dtype=torch.int32)
    ints = "mma.sync.aligned.m16n8k32.row.col{}.s32.s8.s8.s32 {{%r1,%r2,%r3,%r4}},"
    ints += "{{%r7,%r7,%r7,%r7}},{{%r7,%r7}},{{%r6,%r6,%r6,%r6}};"
    body = loads(["%r6"], "%rd50") + "mov.b32 %r7, 0x01010101;"
    e = torch.zeros(32, 4, dtype=torch.int32)
    end = stores(["%r1", "%r2", "%r3", "%r4"], "%rd51")
    run(body + ints.format(".satfinite") + end, [big, e])
    assert e.unique().tolist() == [2**31 - 1]
    run(body + ints.format("") + end, [big, e])
    assert e.unique().tolist() == [2**31 - 5 + 32 - 2**32]


def test_half_precision_accumulators() -> None:
    names = ["%r10", "%r11", "%r12", "%r13", "%r14", "%r15", "%r16", "%r17"]
    words = torch.ones(32, 16, dtype=torch.float16)
    words[:, 12:] = 2.0**11  # C: the sum 2048 + 16 is exact in float16, 2048 + 1 would not be
    text = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1,%r2},"
    text += "{%r10,%r11,%r12,%r13},{%r14,%r15},{%r16,%r17};"
    d = torch.zeros(32, 4, dtype=torch.float16)
    run(loads(names, "%rd50") + text + stores(["%r1", "%r2"], "%rd51"), [words, d])
    assert d.unique().tolist() == [2064.0]


def test_double_precision() -> None:
    a, b = torch.randn(8, 4, generator=SEED).double(), torch.randn(4, 8, generator=SEED).double()
    lane = torch.arange(32)
    words = torch.stack([a[lane // 4, lane % 4], b[lane % 4, lane // 4]], 1)
    d = torch.zeros(32, 2, dtype=torch.float64)
    body = "mad.lo.s64 %rd1, %rd40, 16, %rd50; ld.global.v2.b64 {%rd2, %rd3}, [%rd1];"
    body += "mov.b64 %rd4, 0; mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd5, %rd6},"
    body += "{%rd2}, {%rd3}, {%rd4, %rd4}; mad.lo.s64 %rd1, %rd40, 16, %rd51;"
    run(body + "st.global.v2.b64 [%rd1], {%rd5, %rd6};", [words, d])
    want = a @ b
    assert torch.allclose(d[:, 0], want[lane // 4, lane % 4 * 2], rtol=1e-14)
    assert torch.allclose(d[:, 1], want[lane // 4, lane % 4 * 2 + 1], rtol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count: int, trans: str) -> None:
    x = torch.randint(0, 30000, (8 * count, 8), generator=SEED).short()
    out, back = torch.zeros(32, count, dtype=torch.int32), torch.zeros_like(x)
    names = [f"%r{10 + i}" for i in range(count)]
    group = "{" + ", ".join(names) + "}"
    fill = f"""
    setp.lt.u32 %p1, %r100, {8 * count}; mul.lo.s32 %r1, %r100, 16;
    mad.lo.s64 %rd2, %rd40, 16, %rd50;
    @%p1 ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd2];
    @%p1 st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}}; bar.sync 0;
    """
    form = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    body = fill + f"ldmatrix.{form} {group}, [%r1];" + stores(names, "%rd51")
    body += f"bar.sync 0; add.s32 %r6, %r1, 1024; stmatrix.{form} [%r6], {group}; bar.sync 0;"
    body += """mad.lo.s64 %rd2, %rd40, 16, %rd52; @%p1 ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r6];
    @%p1 st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};"""
    run(body, [x, out, back])
    tiles = x.view(count, 8, 8).transpose(1, 2) if trans else x.view(count, 8, 8)
    got = out.view(torch.int16).view(32, count, 2)
    for lane in range(32):
        for i in range(count):
            row, column = lane // 4, lane % 4 * 2
            assert got[lane, i].tolist() == tiles[i, row, column : column + 2].tolist()
    assert torch.equal(back, x)


# --- warp groups


def test_descriptors_of_swizzled_tiles_address_every_element_once() -> None:
    for layout, span in ((1, 128), (2, 64), (3, 32)):
        depth = 32 // 2
        start, stride = 1024, 8 * span
        word = (start >> 4) | (1 << 16) | (stride >> 4 << 32) | layout << 62
        index = descriptor_index(word, (64, depth), 2, False, (span, {128: 7, 64: 3, 32: 1}[span]))
        assert len(set(index.reshape(-1).tolist())) == 64 * depth
        # row r, 16-byte piece c of it: the piece's number is mixed with the row within the core
        for row, column in ((0, 0), (1, 0), (3, 8), (9, 9), (63, 15)):
            offset = start + row // 8 * stride + row % 8 * span + column * 2
            mixed = offset ^ (((offset >> 7) & {128: 7, 64: 3, 32: 1}[span]) << 4)
            assert index[row, column] == mixed // 2


NO_SWIZZLE = """
shl.b32 %r1, %r100, 4;
mad.lo.s64 %rd1, %rd40, 16, %rd50; ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];
st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};
setp.lt.u32 %p1, %r100, 16; mad.lo.s64 %rd1, %rd40, 16, %rd51;
@%p1 ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];
@%p1 st.shared.v4.b32 [%r1+2048], {%r2, %r3, %r4, %r5};
FENCE bar.sync 0;
mov.b64 %rd2, 0x0000001000400000; mov.b64 %rd3, 0x0000001000080080;
mov.b32 %r10, 0f3F800000; mov.b32 %r11, 0f3F800000; mov.b32 %r12, 0f3F800000;
mov.b32 %r13, 0f3F800000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
  {%r10,%r11,%r12,%r13}, %rd2, %rd3, KEEP, 1, 1, 0, 0;
COMMIT wgmma.commit_group.sync.aligned;
WAIT
mad.lo.s64 %rd1, %rd40, 16, %rd52; st.global.v4.b32 [%rd1], {%r10, %r11, %r12, %r13};
"""


def warpgroup(
    fence: str = "fence.proxy.async.shared::cta;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    keep: str = "1",
    commit: str = "",
) -> tuple[Tensor, Tensor]:
    """A [64, 16] B [16, 8] + 1 by one instruction; both operands in cores of 8 x 16 bytes."""
    a, b = matrix("f16", 64, 16), matrix("f16", 16, 8)
    # a core is 8 rows of 16 bytes; the two halves of K lie 1024 bytes apart, row blocks 256 / 128
    a_cores = a.view(8, 8, 2, 8).permute(2, 0, 1, 3).contiguous()
    b_cores = b.t().contiguous().view(1, 8, 2, 8).permute(2, 0, 1, 3).contiguous()
    text = NO_SWIZZLE.replace("0x0000001000400000", hex(1024 >> 4 << 16 | 128 >> 4 << 32))
    text = text.replace("0x0000001000080080", hex(2048 >> 4 | 128 >> 4 << 16 | 128 >> 4 << 32))
    text = text.replace("FENCE", fence).replace("WAIT", wait).replace("KEEP", keep)
    d = torch.zeros(128, 4)
    run(text.replace("COMMIT", commit), [a_cores, b_cores, d], threads=128)
    want = a.double() @ b.double() + (keep == "1")
    got = torch.zeros(64, 8, dtype=torch.float64)
    for thread in range(128):
        for register in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register // 2)
            got[row, thread % 4 * 2 + register % 2] = d[thread, register].double()
    return got, want


@pytest.mark.parametrize("keep", ["0", "1"])
def test_a_product_of_a_warp_group(keep: str) -> None:
    got, want = warpgroup(keep=keep)
    assert torch.allclose(got, want, atol=1e-5)


def test_matrix_instructions_under_way_own_registers_and_memory() -> None:
    with pytest.raises(NotWaitedFor, match="still owns %r10"):
        warpgroup(wait="")
    with pytest.raises(NotWaitedFor, match="still owns"):
        warpgroup(wait="wgmma.wait_group.sync.aligned 1;")
    with pytest.raises(NotWaitedFor, match="overwritten"):
        warpgroup(wait="st.shared.b32 [%r1], 0; wgmma.wait_group.sync.aligned 0;")
    with pytest.raises(NotWaitedFor, match=r"fence\.proxy\.async"):
        warpgroup(fence="")


def test_an_accumulator_changed_without_a_fence() -> None:
    again = """
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; add.f32 %r10, %r10, %r10;
    {} wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
      {{%r10,%r11,%r12,%r13}}, %rd2, %rd3, 1, 1, 1, 0, 0;
    """
    with pytest.raises(NotWaitedFor, match=r"wgmma\.fence"):
        warpgroup(commit=again.format(""))
    warpgroup(commit=again.format("wgmma.fence.sync.aligned;"))


def test_a_descriptor_beyond_shared_memory() -> None:
    text = "mov.b64 %rd2, 0x4000004000400000; mov.b64 %rd3, 0x00000008000803ff;"
    text += "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2,%r3,%r4},"
    text += "%rd2, %rd3, 0, 1, 1, 0, 0;"
    with pytest.raises(OutOfBounds, match="descriptor"):
        run(text, [], threads=128)
