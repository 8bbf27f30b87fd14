"""What instructions of SASS (NVIDIA) and of GCN, CDNA and RDNA (AMD) are counted as.

The names of SASS are those that cuobjdump prints; NVIDIA lists them in "CUDA Binary Utilities".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .machine_loops import Instruction

MATRIX = ("mma", "int8 mma", "fp8 mma")
"""Families of matrix instructions: 16-bit floats and tf32; int8; 8-bit floats and below."""

_NVIDIA = {
    # by warps (mma.sync), by warp groups (wgmma), by the block from shared memory (tcgen05)
    "mma": r"HMMA|HGMMA|UTCHMMA",
    "int8 mma": r"IMMA|IGMMA|UTCIMMA",
    "fp8 mma": r"QMMA|QGMMA|UTCQMMA|OMMA|UTCOMMA",
    "double mma": r"DMMA",
    "loads": r"LDG",
    "wide loads": r"(?:LDG|LDGSTS)\.(?:\S*\.)?(?:128|256)|UTMALDG|UBLKCP",
    "async copies": r"LDGSTS|UTMALDG|UBLKCP",
    "tma": r"UTMALDG|UBLKCP",
    "ldgsts": r"LDGSTS",
    "stores": r"STG",
    "wide stores": r"STG\.(?:\S*\.)?(?:128|256)|UTMASTG",
    "lds": r"LDS",
    "ldsm": r"LDSM",
    "sts": r"STS|STSM",
    "ldl": r"LDL",
    "stl": r"STL",
    "mufu": r"MUFU",
    "prmt": r"PRMT",
    "i2f": r"I2F|I2FP",
    "bar": r"BAR",
}

_AMD = {
    "mma": r"v_mfma_f32_\w*(?:f16|bf16|xf32|f32)|v_mfma_f32_\w*bf16_1k|v_wmma_f32_\w*(?:f16|bf16)",
    "int8 mma": r"v_(?:mfma|wmma)_i32_\w*(?:i8|iu8)",
    "fp8 mma": r"v_(?:mfma|wmma)_f32_\w*(?:fp8|bf8)\w*",
    "double mma": r"v_mfma_f64_\w+",
    "loads": r"(?:buffer|global)_load_\w+",
    "wide loads": r"(?:buffer|global)_load_(?:dwordx4|b128)",
    "async copies": r"(?:buffer|global)_load_lds_\w+",
    "stores": r"(?:buffer|global)_store_\w+",
    "wide stores": r"(?:buffer|global)_store_(?:dwordx4|b128)",
    "lds": r"ds_(?:read|load)\w*",
    "sts": r"ds_(?:write|store)\w*",
    "scratch": r"scratch_\w+",
    "mufu": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_\w+",
    "prmt": r"v_perm_b32\w*",
    "i2f": r"v_cvt_f32_(?:u|i)\w+",
    "bar": r"s_barrier\w*",
}

_KINDS = {
    True: {kind: re.compile(rf"(?:{names})(?=\.|$)") for kind, names in _NVIDIA.items()},
    False: {kind: re.compile(rf"(?:{names})(?=$|_e\d+$)") for kind, names in _AMD.items()},
}


def count(code: Iterable[Instruction], nvidia: bool) -> dict[str, int]:
    """Instructions by kind, those that occur; "instructions": all of them.

    An instruction can be of several kinds: LDGSTS.128 is an async copy and a wide load.
    """
    opcodes = Counter(instruction.opcode for instruction in code)
    counts = {"instructions": opcodes.total()}
    for kind, pattern in _KINDS[nvidia].items():
        number = sum(times for opcode, times in opcodes.items() if pattern.match(opcode))
        if number:
            counts[kind] = number
    return counts
