"""Tensor maps: how a tensor lies in global memory, for copies of its tiles (PTX ISA 5.5.8).

The 128 bytes are opaque to programs; the simulator has a layout of its own. Only maps that the
program makes itself (tensormap.replace) are known, as Triton's device-side descriptors do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, OutOfBounds, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Builder, Handler, Mask, State, addresses

Array = NDArray[Any]

SIZE = 128
_FIELDS = {
    "global_address": (0, 8),
    "global_stride": (8, 8),
    "rank": (40, 4),
    "box_dim": (44, 4),
    "global_dim": (64, 4),
    "element_stride": (84, 4),
    "elemtype": (104, 4),
    "swizzle_mode": (108, 4),
    "interleave_layout": (112, 4),
    "fill_mode": (116, 4),
}
"""Offset and bytes of an element, in the simulator's own layout."""

_WIDTHS = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
"""Bytes by elemtype: u8, u16, u32, s32, u64, s64, f16, f32, f32.ftz, f64, bf16, tf32, tf32.ftz."""

_SWIZZLE_BITS = (0, 1, 3, 7)


@dataclass(frozen=True)
class TensorMap:
    """A tensor and the boxes that are copied from it; the innermost dimension comes first.

    strides: bytes, of the dimensions after the first. bits: of the address mixed into its piece.
    """

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    width: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.width

    def tile(self, corner: tuple[int, ...]) -> tuple[Array, Array, Array]:
        """(addresses, whether inside the tensor, offsets in the box), one an element of a box."""
        axes = np.meshgrid(*(np.arange(n) for n in reversed(self.box)), indexing="ij")
        steps = [axis.reshape(-1) for axis in reversed(axes)]
        places = [step + at for step, at in zip(steps, corner, strict=True)]
        inside = np.ones(len(steps[0]), bool)
        for place, size in zip(places, self.sizes, strict=True):
            inside &= (place >= 0) & (place < size)
        pitches = (self.width, *self.strides)
        address = self.address + sum(p * s for p, s in zip(places, pitches, strict=True))
        return np.asarray(address), inside, np.arange(len(inside)) * self.width

    def swizzled(self, start: int, offsets: Array) -> Array:
        """Addresses in shared memory of a box that begins at `start`."""
        at = start + offsets
        return at ^ ((at >> 7 & self.bits) << 4)


def read_map(raw: Array) -> TensorMap:
    """The map that 128 bytes hold; a Fault where hardware would refuse it."""

    def value(name: str, index: int = 0) -> int:
        offset, width = _FIELDS[name]
        start = offset + index * width
        return int.from_bytes(raw[start : start + width].tobytes(), "little")

    rank = value("rank") + 1
    kind = value("elemtype")
    if value("interleave_layout") or kind >= len(_WIDTHS) or value("swizzle_mode") > 3 or rank > 5:
        raise Fault(UnsupportedInstruction, "a tensor map of a kind that is new")
    if any(value("element_stride", i) != 1 for i in range(rank)):
        raise Fault(UnsupportedInstruction, "a tensor map that skips elements, or is not complete")
    found = TensorMap(
        value("global_address"),
        tuple(value("global_dim", i) for i in range(rank)),
        tuple(value("global_stride", i) for i in range(rank - 1)),
        tuple(value("box_dim", i) for i in range(rank)),
        _WIDTHS[kind],
        _SWIZZLE_BITS[value("swizzle_mode")],
    )
    span = 16 * (found.bits + 1)
    wrong = found.address % 16 or any(stride % 16 for stride in found.strides)
    if wrong or (found.bits and found.box[0] * found.width > span) or max(found.box) > 256:
        raise Fault(
            OutOfBounds,
            "a tensor map that the copy engine refuses",
            expected="address and strides in units of 16 bytes, a box that its swizzle spans",
            found=str(found),
        )
    return found


class TensorMaps:
    """The maps of a block that were made visible to the copy engine."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.visible: dict[int, TensorMap] = {}
        self.published: set[int] = set()
        state.on_start.append(self.visible.clear)

    def at(self, address: int) -> TensorMap:
        if address not in self.visible:
            raise Fault(
                NotWaitedFor,
                "a copy uses a tensor map that was not made visible to it",
                expected="tensormap.cp_fenceproxy, then fence.proxy.tensormap",
                found=f"address {address:#x}",
            )
        return self.visible[address]

    def publish(self, address: int, raw: Array) -> None:
        words = raw.view(np.uint64).reshape(-1, 1)
        where = address + 8 * np.arange(len(words))
        threads = np.zeros(len(words), np.int64)
        self.state.memory.store(where, threads, 8, words, 0, self.state.traffic)
        self.visible.pop(address, None)

    def acquire(self, address: int) -> None:
        where = address + 8 * np.arange(SIZE // 8)
        threads = np.zeros(len(where), np.int64)
        raw = self.state.memory.load(where, threads, 8, 0, self.state.traffic)
        self.visible[address] = read_map(raw.view(np.uint8).reshape(-1))


def tensor_maps(state: State) -> TensorMaps:
    """The block's only TensorMaps."""
    if "maps" not in state.part:
        state.part["maps"] = TensorMaps(state)
    return state.part["maps"]


def _build(state: State, instruction: Instruction, site: int) -> Handler:
    """tensormap.replace of a map in shared memory, and cp_fenceproxy to global memory."""
    if instruction.words[1] == "replace":
        return _replace(state, instruction)
    if instruction.words[1] == "cp_fenceproxy":
        return _publish(state, instruction)
    raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")


def _replace(state: State, instruction: Instruction) -> Handler:
    name = next(word for word in instruction.words if word in _FIELDS)
    if not any(word.startswith("shared") for word in instruction.words):
        raise Fault(UnsupportedInstruction, "tensormap.replace outside shared memory")
    offset, width = _FIELDS[name]
    *index, operand = instruction.operands[1:]
    start = offset + (int(index[0], 0) * width if index else 0)
    now = addresses(state, instruction.operands[0])
    bits = numpy_type(f"u{8 * width}")
    given = 4 if instruction.type == "b32" else 8
    value = state.registers.source(operand, numpy_type(f"u{8 * given}"))
    shared = state.shared

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            at = now()[thread : thread + 1]
            shared.index(at, state.everyone[thread : thread + 1], SIZE)
            place = int(at[0]) + start
            shared.data[1][place : place + width] = (
                value[thread : thread + 1].astype(bits).view(np.uint8)
            )

    return run


def _publish(state: State, instruction: Instruction) -> Handler:
    goal, origin = (addresses(state, each) for each in instruction.operands[:2])
    maps = tensor_maps(state)

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if len(threads):
            thread = threads[:1]
            index, unit = state.shared.index(origin()[thread], thread, SIZE)
            maps.publish(int(goal()[thread[0]]), state.shared.data[unit][index].copy())

    return run


def acquire(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of fence.proxy.tensormap: the map at an address becomes usable."""
    del site
    if "acquire" not in instruction.words:
        return lambda mask: None
    now = addresses(state, instruction.operands[0])
    maps = tensor_maps(state)

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if len(threads):
            maps.acquire(int(now()[threads[0]]))

    return run


TENSORMAP: Mapping[str, Builder] = {"tensormap": _build}
"""Builders by the first word of the opcode."""
