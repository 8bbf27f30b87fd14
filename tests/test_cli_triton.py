"""`planish export --target triton` from the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planish import cli
from planish.codegen.package_runner import check
from tiny_program import save_tiny, write_recipe
from typer.testing import CliRunner, Result


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a saved program and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    save_tiny(tmp_path / "program")
    return tmp_path


def export(*arguments: str) -> Result:
    fixed = ["export", "program", "--recipe", "small.yaml", "--target", "triton", "--out", "out"]
    return CliRunner().invoke(cli.app, [*fixed, *arguments])


def test_a_package_is_written_and_checked(work: Path) -> None:
    """Few rows, so that both products split the summed axis and add up their parts."""
    ended = export("--arch", "sm_90", "--target-set", "lengths=6", "--json", "told.json")
    assert ended.exit_code == 0, ended.stderr
    told = check(work / "out")["triton"]
    assert told["archs"] == ["sm_90"] and list(told["binaries"]) == ["sm_90"]
    assert told["launches"] == {"linear_field_split_kernel": 2, "linear_reduce_kernel": 2}
    assert json.loads((work / "told.json").read_text())["target"] == "triton"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--arch", "sm_91"), "did you mean sm_90"),
        (("--arch", "sm_90", "--target-set", "lengths=0"), "numbers of tokens"),
        (("--target-set", "activations=int8"), "activations"),
        (("--profile", "ort"), "ort"),
    ],
)
def test_bad_orders_write_nothing(work: Path, arguments: tuple[str, ...], sentence: str) -> None:
    ended = export(*arguments)
    assert ended.exit_code == 2
    assert sentence in ended.stderr
    assert not (work / "out").exists()


def test_an_architecture_is_for_triton_only(work: Path) -> None:
    ended = CliRunner().invoke(
        cli.app, ["export", "program", "--recipe", "small.yaml", "--arch", "sm_90", "--out", "out"]
    )
    assert ended.exit_code == 2
    assert "arch" in ended.stderr
