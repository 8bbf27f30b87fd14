"""A pass of another distribution is installed by pip and used through a recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"
RECIPE = """
name: with a plugin
passes:
  - cancel_negations: {note: tried}
  - drop_dead
"""
SCRIPT = """
import torch, planish
class Model(torch.nn.Module):
    def forward(self, x):
        return -(-(x * 3))
x = torch.randn(2, 5)
done = planish.optimize(Model(), (x,), recipe="recipe.yaml", verify="numbers")
assert torch.equal(done.program(x), x * 3)
record = done.history.records[0]
print(record.name, len(record.applied), record.options["note"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the distribution into."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    pip += ["--no-index", "--disable-pip-version-check", "--target", str(folder / "site")]
    made = subprocess.run(
        [*pip, str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return folder / "site"


def run(command: list[str], site: Path | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if site is not None:
        variables["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=variables,
    )


def test_its_pass_runs_through_a_recipe(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = run(["-c", SCRIPT], installed, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.strip() == "cancel_negations 1 tried"


def test_its_pass_is_listed(installed: Path, tmp_path: Path) -> None:
    ended = run(["-m", "planish", "passes", "--json", "passes.json"], installed, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    listed = {entry["name"]: entry for entry in json.loads((tmp_path / "passes.json").read_text())}
    assert listed["cancel_negations"]["summary"] == "Remove pairs of negations."
    assert listed["cancel_negations"]["contract"]["fidelity"] == "exact"
    assert "drop_dead" in listed


def test_without_it_the_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = run(["-c", SCRIPT], None, tmp_path)
    assert ended.returncode == 1
    assert "UnknownPass: unknown pass 'cancel_negations'" in ended.stderr


def test_an_entry_point_that_is_no_pass_is_named(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    points = next(site.glob("*.dist-info/entry_points.txt"))
    points.write_text("[planish.passes]\ncancel_negations = json:dumps\n")
    ended = run(["-m", "planish", "passes"], site, tmp_path)
    assert ended.returncode == 2
    assert "is not a Pass class" in ended.stderr
    points.write_text("[planish.passes]\ncancel_negations = no_such_module:Thing\n")
    ended = run(["-m", "planish", "passes"], site, tmp_path)
    assert ended.returncode == 2
    assert "does not load" in ended.stderr
    assert "reinstall or remove" in ended.stderr
