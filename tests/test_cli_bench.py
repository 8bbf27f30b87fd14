"""planish bench kernels: counted figures and bounds, each called what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import planish.cli_bench as cli_bench
import pytest
from planish.cli import app
from planish.kernels import catalog
from planish.kernels.published import RECORDS, records_for
from tiny_matmul import SMALL, tiny_spec
from typer.testing import CliRunner


def run(*arguments: str) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, ["bench", "kernels", *arguments], env={"COLUMNS": "220"})
    return ended.exit_code, ended.stdout, ended.stderr


@pytest.fixture
def only_the_tiny_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(tiny_spec(config=SMALL), name="tiny_attention")
    monkeypatch.setattr(catalog, "triton_kernels", lambda: {spec.name: spec})


@pytest.mark.usefixtures("only_the_tiny_kernel")
def test_the_table_and_the_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, shown, _ = run("--arch", "sm_80", "--json", str(file))
    assert code == 0
    assert shown.count("bound, not measured") == 2
    assert "FlashAttention-3" in shown
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["label"] == "bound, not measured"
    (call,) = data["calls"]
    nbytes = 2 * 512 * (256 + 512) + 4 * 256 * 512
    assert call["bytes"] == nbytes
    assert call["operations"] == 2 * 256 * 512 * 512
    assert call["intensity"] == pytest.approx(call["operations"] / nbytes)
    assert call["ideal"]["A100"]["seconds"] == pytest.approx(nbytes / 2.039e12)
    assert {ideal["label"] for ideal in call["ideal"].values()} == {data["label"]}
    (row,) = data["code"]
    assert row["arch"] == "sm_80"
    assert row["matrix"] == {"mma": 64}
    assert row["bound"]["label"] == data["label"]
    assert 0 < row["bound"]["rate"] < 312e12
    assert len(data["published"]) == len(records_for("attention"))


@pytest.mark.usefixtures("only_the_tiny_kernel")
def test_without_the_model_nothing_is_bounded() -> None:
    code, shown, _ = run("--arch", "gfx942", "--no-model")
    assert code == 0
    assert "bound" not in shown
    assert "A100" not in shown
    assert "gfx942" in shown


def test_mistakes_are_named() -> None:
    for arguments in (("--kernel", "gatd"), ("--arch", "sm_8", "--kernel", "gated")):
        code, _, error = run(*arguments)
        assert code == 2
        assert arguments[1] in error
    assert "did you mean gated" in run("--kernel", "gatd")[2]


def test_records_name_their_source() -> None:
    assert all(record.source and record.figure for record in RECORDS)
    assert records_for("gated") == []
    assert cli_bench.ARCHS_BOUNDED == ("sm_80", "sm_90")
