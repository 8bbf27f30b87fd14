"""Warp-wide matrix instructions: ldmatrix, stmatrix, mma.sync (PTX ISA 9.7.14).

Products are exact and summed in float32 (int8 products stay exact in it); the order in which a
tensor core adds, and its truncation, are not modelled. tf32 operands lose their low 13 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_numbers import E4M3, E5M2, from_bf16
from .ptx_parse import Instruction
from .ptx_registers import elements
from .ptx_state import Builder, Handler, Mask, State, addresses, known, side_by_side

Array = NDArray[Any]

WIDTHS = {"f64": 8, "tf32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}
"""Bytes of an element of the operands A and B."""

_FORMS = ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")


def numbers(raw: Array, kind: str) -> Array:
    """Raw elements (unsigned, of the kind's width) as the float32 or float64 that they mean."""
    match kind:
        case "f16":
            return raw.view(np.float16).astype(np.float32)
        case "bf16":
            return from_bf16(raw)
        case "tf32":
            return (raw & np.uint32(0xFFFFE000)).view(np.float32)
        case "s8":
            return raw.view(np.int8).astype(np.float32)
        case "u8":
            return raw.astype(np.float32)
        case "e4m3":
            return E4M3.widen(raw)
        case "e5m2":
            return E5M2.widen(raw)
        case "f64":
            return raw.view(np.float64)
        case _:
            raise Fault(UnsupportedInstruction, f"matrices of {kind}")


def operand_types(instruction: Instruction) -> list[str]:
    """The types of a matrix instruction's operands, in their order."""
    return [word for word in instruction.words if word in WIDTHS or word in ("f32", "s32")]


def _count(instruction: Instruction) -> int:
    return next(int(word[1:]) for word in instruction.words if word in ("x1", "x2", "x4"))


def _load_matrix(state: State, instruction: Instruction, site: int) -> Handler:
    """ldmatrix: 8 x 8 halves, a row of 16 bytes at each address of eight lanes."""
    words = known(instruction, *_FORMS)
    count = _count(instruction)
    targets = [
        state.registers.target(name, np.uint32) for name in elements(instruction.operands[0])
    ]
    now = addresses(state, instruction.operands[1])
    threads = np.flatnonzero(state.everyone % 32 < 8 * count)
    shared, traffic, warps = state.shared, state.traffic, state.warps

    def run(mask: Mask) -> None:
        who = threads if mask is True else threads[mask[threads]]
        rows = shared.load(now()[who], who, 16, site, traffic)
        warp_count = warps if mask is True else len(who) // (8 * count)
        tiles = rows.view(np.uint16).reshape(warp_count, count, 8, 8)
        if "trans" in words:
            tiles = tiles.swapaxes(2, 3)
        # lane 4r + c holds elements 2c and 2c + 1 of row r
        parts = np.ascontiguousarray(tiles).view(np.uint32).reshape(warp_count, count, 32)
        for column, target in enumerate(targets):
            if mask is True:
                target[:] = parts[:, column].reshape(-1)
            else:
                target[mask] = parts[:, column].reshape(-1)

    return run


def _store_matrix(state: State, instruction: Instruction, site: int) -> Handler:
    """stmatrix: the inverse of ldmatrix."""
    words = known(instruction, *_FORMS)
    count = _count(instruction)
    sources = [
        state.registers.source(name, np.uint32) for name in elements(instruction.operands[1])
    ]
    now = addresses(state, instruction.operands[0])
    threads = np.flatnonzero(state.everyone % 32 < 8 * count)
    shared, traffic = state.shared, state.traffic

    def run(mask: Mask) -> None:
        tiles = np.stack([source.reshape(-1, 32) for source in sources], 1).view(np.uint16)
        tiles = tiles.reshape(-1, count, 8, 8)
        if "trans" in words:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        rows = tiles.view(np.uint64).reshape(-1, 2)
        chosen = slice(None) if mask is True else mask[threads]
        who = threads[chosen]
        shared.store(now()[who], who, 16, rows[chosen], site, traffic)

    return run


def _matrix_multiply(state: State, instruction: Instruction, site: int) -> Handler:
    """mma.sync: D = A B + C by fragments."""
    del site
    words = known(
        instruction, "sync", "aligned", "row", "col", "satfinite", *instruction.words[1:-1]
    )
    shape = next(
        (re.match(r"m(\d+)n(\d+)k(\d+)$", word) for word in words if word[:2] in ("m1", "m8")), None
    )
    types = operand_types(instruction)
    odd = [w for w in words if w.startswith("kind") or "scale" in w or w in ("sp", "xor", "and")]
    if shape is None or odd or len(types) != 4 or "row" not in words or "col" not in words:
        raise Fault(UnsupportedInstruction, f"mma {' '.join(odd)} of {' '.join(types)} is new")
    rows, columns, depth = (int(size) for size in shape.groups())
    to, left, right, addend = types
    get_a = fragment(state, instruction.operands[1], left, rows // 8, depth)
    get_b = fragment(state, instruction.operands[2], right, columns // 8, depth)
    get_c = _accumulators(state, instruction.operands[3], addend, rows // 8, False)
    get_d = _accumulators(state, instruction.operands[0], to, rows // 8, True)
    warps = state.warps

    def run(mask: Mask) -> None:
        product = np.matmul(get_a(), get_b().swapaxes(1, 2))
        pieces = product.reshape(warps, rows // 8, 32, 2)
        for part, (target, source) in enumerate(zip(get_d, get_c, strict=True)):
            # register `part` holds the pair (or one of it) of rows 8 r ... 8 r + 7
            total = _pick(pieces, part, len(get_d), rows // 8)
            if to == "s32":
                result: Array = total.astype(np.int64).reshape(-1) + source
                if "satfinite" in words:
                    result = np.clip(result, -(2**31), 2**31 - 1)
                result = result.astype(np.int32)
            else:
                result = total.reshape(source.shape) + source
            where = mask if mask is True or target.ndim == 1 else mask[:, None]
            np.copyto(target, result, where=where, casting="unsafe")

    return run


def _pick(pieces: Array, part: int, parts: int, blocks: int) -> Array:
    """The part of [warps, row blocks, 32, 2] that one register of each lane holds."""
    if parts == 2 * blocks:
        return pieces[:, part // 2, :, part % 2]
    return pieces[:, part]


def fragment(state: State, operand: str, kind: str, blocks: int, depth: int) -> Callable[[], Array]:
    """A function to A [warps, rows, depth] or to B's transpose [warps, columns, depth].

    A lane's register holds the elements of row lane / 4 at columns lane % 4 * per and on; the
    registers go over the 8-row blocks first, then over the parts of the depth.
    """
    width = WIDTHS[kind]
    bits = np.uint64 if width == 8 else np.uint32
    raw = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
    sources = [state.registers.source(name, bits) for name in elements(operand)]
    per = 1 if width == 8 else 4 // width
    steps = depth // (4 * per)
    if len(sources) != blocks * steps:
        raise Fault(UnsupportedInstruction, f"a fragment of {len(sources)} registers")

    def get() -> Array:
        stacked = side_by_side(sources).view(raw).reshape(state.warps, 8, 4, steps, blocks, per)
        tile = stacked.transpose(0, 4, 1, 3, 2, 5).reshape(state.warps, 8 * blocks, depth)
        return numbers(tile, kind)

    return get


def _accumulators(state: State, operand: str, kind: str, blocks: int, target: bool) -> list[Array]:
    """C or D: float32 or int32 [threads] a register, or float16 pairs [threads, 2]."""
    dtype = {"f32": np.float32, "s32": np.int32, "f16": np.uint32, "f64": np.float64}[kind]
    names = elements(operand)
    if len(names) != (blocks if kind == "f16" else 2 * blocks):
        raise Fault(UnsupportedInstruction, f"accumulators of {len(names)} registers")
    get = state.registers.target if target else state.registers.source
    found = [get(name, dtype) for name in names]
    if kind == "f16":
        return [each.view(np.float16).reshape(-1, 2) for each in found]
    return found


TENSOR_CORE: Mapping[str, Builder] = {
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _matrix_multiply,
}
"""Builders by the first word of the opcode."""
