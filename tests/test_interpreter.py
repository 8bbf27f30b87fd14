"""The repaired interpreter computes as torch does, bit by bit, and stays inside of its tensors."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planish.kernels import interpreter_numbers as numbers
from planish.kernels.interpreter import InterpreterOff, repair
from planish.kernels.interpreter_bounds import OutOfBounds, extent_of
from planish.kernels.triton_version import WrongTriton

FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
ALL_16 = np.arange(65536, dtype=np.uint16)
ALL_8 = np.arange(256, dtype=np.uint8)


def random_floats(count: int = 500_000) -> np.ndarray:
    """Of every exponent, infinities and NaN too."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def between(values: np.ndarray) -> np.ndarray:
    """The midpoints of neighbours, where rounding to even decides."""
    finite = np.unique(values[np.isfinite(values)].astype(np.float64))
    return ((finite[1:] + finite[:-1]) / 2).astype(np.float32)


def as_bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    """The same values, NaN where NaN, zeros of the same sign."""
    assert have.dtype == want.dtype
    assert torch.equal(have.isnan(), want.isnan())
    number = ~want.isnan()
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.itemsize]
    assert torch.equal(have[number].view(as_bits), want[number].view(as_bits))


def test_every_bf16_is_decoded() -> None:
    assert_same(torch.from_numpy(numbers.bf16_values(ALL_16)), as_bf16(ALL_16).float())


def test_bf16_is_rounded_to_nearest_even() -> None:
    every = numbers.bf16_values(ALL_16)
    x = np.concatenate([every, random_floats(), between(every)])
    want = torch.from_numpy(x).bfloat16()
    assert_same(as_bf16(numbers.bf16_bits(x)), want)
    cut = as_bf16((x.view(np.uint32) >> 16).astype(np.uint16))  # what Triton 3.9 does
    number = torch.from_numpy(np.isfinite(x))
    assert (cut[number] != want[number]).sum() > 200_000


def test_every_fp8_is_decoded() -> None:
    for name, dtype in FP8.items():
        have = torch.from_numpy(numbers.fp8_values(ALL_8, name))
        assert_same(have, torch.from_numpy(ALL_8).view(dtype).float())


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_rounded_and_saturates(name: str) -> None:
    dtype = FP8[name]
    every = numbers.fp8_values(ALL_8, name)
    x = np.concatenate([every, random_floats(), between(every), numbers.bf16_values(ALL_16)])
    have = torch.from_numpy(numbers.fp8_bits(x, name)).view(dtype)
    largest = torch.finfo(dtype).max
    given = torch.from_numpy(x)
    assert_same(have, given.clamp(-largest, largest).to(dtype))
    beyond = numbers.fp8_bits(np.float32([1e6, -np.inf]), name)
    assert numbers.fp8_values(beyond, name).tolist() == [largest, -largest]


def test_a_float64_is_rounded_to_bf16_once() -> None:
    """1 + 2**-8 is a tie; what lies below it decides, and float32 has no room for that."""
    x = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8 - 2**-40, -1e-50, np.inf, np.nan])
    have = as_bf16(numbers.bf16_bits_once(x)).double()
    assert have[:3].tolist() == [1 + 2**-7, 1.0, 1 + 2**-7]
    assert have[3] == 0 and have[4] == torch.inf and have[5].isnan()
    twice = as_bf16(numbers.bf16_bits(x.astype(np.float32))).double()
    assert twice[:3].tolist() == [1.0, 1.0, 1 + 2**-6]
    y = np.random.default_rng(0).normal(size=100_000)
    once = as_bf16(numbers.bf16_bits_once(y)).double().numpy()
    near = as_bf16(numbers.bf16_bits(y.astype(np.float32))).double().numpy()
    assert (np.abs(once - y) <= np.abs(near - y)).all()


def test_tf32_keeps_ten_bits() -> None:
    """As it is read by a tensor core: cut short, toward zero."""
    x = random_floats()
    x = x[np.isfinite(x) & (np.abs(x) > 2.0**-126)]
    have = numbers.tf32_values(x).astype(np.float64)
    assert not (numbers.tf32_values(x).view(np.uint32) & 0x1FFF).any()
    assert (np.abs(have - x) < np.abs(x) * 2.0**-10).all()
    assert (np.abs(have) <= np.abs(x)).all()
    assert (np.abs(have - x) > np.abs(x) * 2.0**-11).any()  # rounding would not err so much
    special = np.float32([1 + 2.0**-10, -1 - 2.0**-11, np.inf, -np.inf])
    assert numbers.tf32_values(special).tolist() == [1 + 2**-10, -1, np.inf, -np.inf]


def test_the_extent_of_a_view() -> None:
    both = torch.zeros(3, 20)
    half = extent_of("X", both[:, :10], strict=True)
    assert half.high - half.low == 4 * 50
    assert extent_of("X", both[:, :10], strict=False).high - half.low == 4 * 60
    nothing = extent_of("X", both[:0], strict=True)
    assert nothing.high == nothing.low
    last = np.array([half.high - 4], dtype=np.uint64)
    half.check(last, 4, "a load", (0,))
    with pytest.raises(OutOfBounds, match="1 of 1 active addresses"):
        half.check(last + np.uint64(1), 4, "a load", (0,))
    with pytest.raises(OutOfBounds, match="1 of 1 active addresses"):
        half.check(last, 8, "a load", (0,))


def test_it_is_refused_where_kernels_are_compiled() -> None:
    with pytest.raises(InterpreterOff, match="TRITON_INTERPRET=1 in the environment"):
        repair()


def test_it_is_refused_once_triton_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InterpreterOff, match="triton was imported before TRITON_INTERPRET"):
        repair()


def test_another_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0")
    with pytest.raises(WrongTriton, match=r"found: triton 3\.10\.0"):
        repair()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checks of interpreted.py say, in the process that they need."""
    ran = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("interpreted.py"))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("interpreted"),
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_kernels_compute_as_torch_does(interpreted: dict[str, Any]) -> None:
    said = interpreted["repaired"]
    assert len(said) == 27
    assert {name: text for name, text in said.items() if text} == {}


def test_every_replacement_is_needed(interpreted: dict[str, Any]) -> None:
    """Taking back a single one makes a check fail; that of erf is there for its speed."""
    taken_back = interpreted["taken back"]
    assert len(taken_back) > 20
    unneeded = {name for name, failed in taken_back.items() if not failed}
    assert unneeded == {"InterpreterBuilder.create_erf"}


def test_a_storage_is_open_where_that_is_asked_for(interpreted: dict[str, Any]) -> None:
    assert interpreted["loose"] is None


def test_the_repair_is_undone(interpreted: dict[str, Any]) -> None:
    assert interpreted["undone"] is True
