"""Memory traffic of executed cases against checked-in figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planish.kernels import ladder_execute, traffic
from planish.kernels.catalog import triton_kernels
from planish.kernels.ladder_problem import Ask
from planish.kernels.traffic import COUNTS, FILE, grown, key_of, measured, read, store

GATED = triton_kernels()["gated"]
CASE, ARCH = "silu bf16", "sm_80"
KEY = key_of(GATED, CASE, ARCH)


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return measured(GATED, [ARCH])[KEY]


def test_a_gate_reads_what_it_must(counts: dict[str, int]) -> None:
    """Three rows of two times 700 values of two bytes; sectors that warps share are read twice."""
    least = 3 * 2 * -(-700 * 2 // 32)
    assert least <= counts["sectors read"] <= 2 * least
    assert counts["shared wavefronts"] == 0


def test_figures_are_kept_by_operator(counts: dict[str, int], tmp_path: Path) -> None:
    file = tmp_path / "traffic.json"
    store({"other::op | case | sm_80": counts}, file)
    store({KEY: counts}, file)
    assert set(read(file)) == {"other::op | case | sm_80", KEY}
    store({key_of(GATED, "gone", ARCH): counts}, file)
    assert KEY not in read(file)


@pytest.mark.parametrize("name", ["shared wavefronts", "sectors read", "sectors written"])
def test_what_grew_is_told_with_both_figures(
    name: str, counts: dict[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "traffic.json"
    store({KEY: counts}, file)
    assert grown(KEY, counts, file) is None
    assert grown(KEY, {**counts, name: counts[name] + 3}, file) == (
        f"more memory traffic than its budget: {name} {counts[name]} -> {counts[name] + 3}"
    )
    assert grown("other::op | case | sm_80", {**counts, name: 10**9}, file) is None


def test_rung_four_fails_where_traffic_grew(
    counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    less = tuple(max(counts[name] - 1, 0) for name in COUNTS)
    monkeypatch.setattr(traffic, "read", lambda file: {KEY: less})
    (outcome,) = ladder_execute.climb(GATED, Ask((ARCH,), CASE))
    assert outcome.status == "failed"
    assert "sectors read" in outcome.sentence


def test_the_file_names_cases_that_are_there() -> None:
    known = {
        key_of(spec, case.name, arch)
        for spec in triton_kernels().values()
        for case in spec.cases
        for arch in case.archs
    }
    assert set(json.loads(FILE.read_text())) <= known
