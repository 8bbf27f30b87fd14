"""`planish export --target-shape`: the shape reaches the cut, and what is wrong is told at once."""

from __future__ import annotations

import json
from pathlib import Path

import captured
import pytest
import zoo
from planish import cli
from planish.ir.program_folder import load_program, save_program
from safetensors.torch import save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_program(captured.captured("llama"), folder / "base")
    given = zoo.build("llama", "sdpa").other_inputs(2, 11)
    save_file({f"0.{name}": value for name, value in given.items()}, folder / "batches.safetensors")
    return folder


def call(*arguments: object) -> tuple[int, str]:
    ended = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return ended.exit_code, ended.output


def test_the_model_gets_the_shape(base: Path, tmp_path: Path) -> None:
    shape = "layers=1,heads=3,ffn=64,hidden=36"
    code, told = call(
        *("export", base / "base", "--out", tmp_path / "out", "--target", "torch"),
        *("--target-shape", shape, "--calibration", base / "batches.safetensors"),
        *("--json", tmp_path / "told.json"),
    )
    assert code == 0, told
    result = json.loads((tmp_path / "told.json").read_text())
    assert result["recipe"] == "cut" and result["options"] == {"cut.shape": shape}
    program = load_program(tmp_path / "out")
    shapes = {name: tuple(program.weights.shape(name)) for name in program.weights}
    assert not any("layers.1." in name for name in shapes) or not any(
        "layers.0." in name for name in shapes
    )
    (down,) = (value for name, value in shapes.items() if "down_proj" in name)
    (out,) = (value for name, value in shapes.items() if "o_proj" in name)
    assert (down, out) == ((36, 64), (36, 30))


def test_the_plan_shows_the_shape(base: Path) -> None:
    code, told = call("export", base / "base", "--dry-run", "--target-shape", "ffn=64")
    assert code == 0 and "shape=ffn=64" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--target-shape", "heads=5"], "the nearest legal shape is heads=6,kv_heads=2"),
        (["--target-shape", "depth=5"], "cut.shape cannot be 'depth=5'"),
        (["--target-shape", ""], "the target shape is empty"),
        (["--target-shape", "ffn=64", "--set", "cut.shape=ffn=32"], "given twice"),
        (["--target-shape", "ffn=64", "--recipe", "raise"], "cut"),
    ],
)
def test_wrong_shapes_are_refused_and_leave_nothing(
    arguments: list[str], sentence: str, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, told = call("export", base / "base", "--out", out, "--target", "torch", *arguments)
    assert code != 0 and sentence in " ".join(told.split())
    assert "Traceback" not in told and not out.exists()
