"""The commands: what they print, write and leave alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import planish
import pytest
import torch
import yaml
import zoo
from planish import cli
from planish.codegen.run_onnx import OnnxModel
from planish.ir.program_folder import load_program
from planish.recipes import read_recipe, recipes
from safetensors.torch import save_file
from tiny_program import ids, save_tiny, write_recipe
from typer.testing import CliRunner, Result


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "program")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"small.yaml"}


def test_help_names_every_command() -> None:
    told = call("--help").stdout
    for command in ("demo", "export", "generate", "explain", "passes", "recipes"):
        assert command in told
    assert call("--version").stdout.strip() == f"planish {planish.__version__}"


def test_passes_lists_options_and_contracts(work: Path) -> None:
    ended = call("passes", "--json", "passes.json")
    assert ended.exit_code == 0, ended.stderr
    assert "quantize_weights (lossy): Round weights to nearest" in ended.stdout
    assert "    group_size: int | None = None" in ended.stdout
    listed = {entry["name"]: entry for entry in json.loads(Path("passes.json").read_text())}
    bits = listed["quantize_weights"]["options"][0]
    assert bits == {"name": "bits", "type": "int", "default": 8}
    assert listed["drop_dead"]["contract"]["fidelity"] == "exact"
    assert all(entry["summary"] for entry in listed.values())


def test_recipes_lists_and_prints_yaml(work: Path) -> None:
    ended = call("recipes", "--json", "recipes.json")
    assert ended.exit_code == 0, ended.stderr
    names = {entry["name"] for entry in json.loads(Path("recipes.json").read_text())}
    assert names == set(recipes())
    printed = call("recipes", "--yaml", "int4", "--json", "int4.json").stdout
    assert read_recipe(printed) == recipes()["int4"]
    assert yaml.safe_load(json.loads(Path("int4.json").read_text())["yaml"])["name"] == "int4"


def test_a_targets_own_option_is_checked_and_reaches_it(work: Path, saved: Path) -> None:
    order = ("export", saved, "--recipe", "small.yaml", "--out", "out", "--target-set")
    refused = call(*order, "activation=int8")
    assert refused.exit_code == 2
    assert "did you mean activations or attention?" in refused.stderr
    assert call(*order, "activations=int8").exit_code == 0
    manifest = json.loads(Path("out/planish.json").read_text())
    assert manifest["target_options"] == {
        "activations": "int8",
        "logits": "all",
        "attention": "onnx",
    }


def test_export_writes_a_folder_and_json(work: Path, saved: Path) -> None:
    ended = call(
        *("export", saved, "--recipe", "small.yaml", "--out", "deep/out", "--json", "told.json"),
        *("--set", "quantize_weights.bits=4", "--verify", "numbers"),
    )
    assert ended.exit_code == 0, ended.stderr
    told = json.loads(Path("told.json").read_text())
    assert told["options"] == {"quantize_weights.bits": "4"}
    assert set(told["files"]) == {
        str(p.relative_to("deep/out")) for p in Path("deep/out").rglob("*") if p.is_file()
    }
    assert told["nbytes"]["after"] < 0.5 * told["nbytes"]["before"]
    assert told["history"][-1]["options"]["bits"] == 4
    assert told["peak_memory"] > 50_000_000
    assert set(told["seconds"]) == {"capture", "optimize", "write"}
    assert "quantize_weights: 2 rewrites" in ended.stdout
    assert left_over(work) == {"deep", "told.json"}


def test_dry_run_prints_the_plan_and_writes_nothing(work: Path, saved: Path) -> None:
    plain = call("export", saved, "--recipe", "small.yaml", "--out", "out", "--json", "real.json")
    assert plain.exit_code == 0, plain.stderr
    shutil.rmtree("out")
    ended = call("export", saved, "--recipe", "small.yaml", "--out", "out", "--dry-run")
    assert ended.exit_code == 0, ended.stderr
    assert left_over(work) == {"real.json"}
    assert "group_size=16" in ended.stdout
    assert "nothing was written" in ended.stdout
    assert (
        call(
            *("export", saved, "--recipe", "small.yaml", "--dry-run", "--json", "plan.json")
        ).exit_code
        == 0
    )
    plan, real = (json.loads(Path(f"{name}.json").read_text()) for name in ("plan", "real"))
    assert plan["nbytes"] == real["nbytes"]
    assert [step["name"] for step in plan["passes"]] == [r["name"] for r in real["history"]]


def test_an_existing_folder_is_replaced_only_with_force(work: Path, saved: Path) -> None:
    out = work / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    arguments = ["export", saved, "--recipe", "small.yaml", "--out", out]
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "OutputExists" in refused.stderr
    assert "--force" in refused.stderr
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert call(*arguments, "--force").exit_code == 0
    assert not (out / "mine.txt").exists()
    assert left_over(work) == {"out"}


def test_a_failed_export_keeps_the_folder_that_it_would_replace(
    work: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = work / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    wrong = ["--set", "quantize_weights.group_size=7"]
    ended = call("export", saved, "--recipe", "small.yaml", "--out", out, "--force", *wrong)
    assert ended.exit_code == 2
    assert (out / "mine.txt").read_text() == "precious"
    assert left_over(work) == {"out"}


def test_an_interruption_leaves_nothing(
    work: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planish.codegen.bundle._put_in_place", interrupted)
    ended = call("export", saved, "--recipe", "small.yaml", "--out", "a/out", "--json", "told.json")
    assert ended.exit_code == 130
    assert "interrupted" in ended.stderr
    assert left_over(work) == set()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_leaves_nothing(number: int, code: int, work: Path, saved: Path) -> None:
    script = (
        "import signal, sys, time\nfrom planish import cli\nfrom planish.codegen import bundle\n"
        # a shell ignores it for what it runs in the background, and children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*arguments):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "bundle._put_in_place = wait\n"
        f"sys.argv = ['planish', 'export', {str(saved)!r}, '--recipe', 'small.yaml',"
        " '--out', 'out']\ncli.main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    child.send_signal(number)
    child.communicate(timeout=30)
    assert child.returncode == code
    assert left_over(work) == set()


def test_a_bug_shows_its_traceback(
    work: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(source: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("planish.cli_explain.explain_source", bug)
    ended = call("explain", saved)
    assert isinstance(ended.exception, ZeroDivisionError)


def test_calibration_batches_are_read(work: Path, saved: Path) -> None:
    batches = {"0.input_ids": ids(2, 6), "1.input_ids": ids(3, 4)}
    save_file(batches, work / "batches.safetensors")
    arguments = ["export", saved, "--recipe", "small.yaml", "--out", "out"]
    ended = call(*arguments, "--calibration", "batches.safetensors", "--verify", "numbers")
    assert ended.exit_code == 0, ended.stderr


def test_a_hugging_face_folder_is_exported_and_runs(work: Path) -> None:
    sample = zoo.build("llama", layers=1)
    sample.model.save_pretrained(work / "model")
    arguments = ["export", "model", "--recipe", "small.yaml", "--out", "out"]
    ended = call(*arguments, "--set", "quantize_weights.skip=*")
    assert ended.exit_code == 0, ended.stderr
    inputs = sample.other_inputs()
    with_planish = OnnxModel(work / "out")(**inputs)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(
            with_planish, sample.model(**inputs).logits, rtol=1e-4, atol=1e-5
        )


def test_explain_prints_a_report(work: Path, saved: Path) -> None:
    ended = call("explain", saved, "--json", "report.json")
    assert ended.exit_code == 0, ended.stderr
    report = json.loads(Path("report.json").read_text())
    assert report["kind"] == "report"
    assert report["parameters"] == load_program(saved).parameter_count()
    assert f"{report['parameters']:,} parameters" in ended.stdout


def test_python_dash_m_and_the_script_are_the_same() -> None:
    script = Path(sys.executable).parent / "planish"
    commands = ([sys.executable, "-m", "planish"], [str(script)])
    told = [subprocess.run([*c, "--version"], capture_output=True, text=True) for c in commands]
    assert [t.stdout for t in told] == [f"planish {planish.__version__}\n"] * 2
