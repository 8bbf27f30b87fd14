"""The wheel holds what the tree holds, and importing planish is fast and loads nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import planish
import pytest

ROOT = Path(planish.__file__).parent
ROOMS = ("ir", "passes", "kernels", "codegen")
DATA = ("py.typed", "demo_text.txt")


def modules() -> set[str]:
    """Every source and data file of the package, as the wheel should name it."""
    files = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).glob("*.py"))]
    files += [ROOT / name for name in DATA]
    files += [*(ROOT / "kernels").glob("*.c"), *(ROOT / "kernels").glob("*.h")]
    files += [*(ROOT / "kernels").glob("*.json"), *(ROOT / "codegen").glob("*.jinja")]
    return {f"planish/{file.relative_to(ROOT)}" for file in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build/ folder stays in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, copy, ignore=hidden)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    made = subprocess.run([*build, str(copy)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licenses = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
    assert names == modules()
    assert licenses


def test_the_wheel_works_apart_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import planish; "
        "from planish.demo_models import demo_text; "
        "assert len(demo_text()) > 4000; print(planish.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.strip() == str(tmp_path / "planish" / "__init__.py")


def test_pyproject_agrees_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == planish.__version__
    assert distribution("planish").version == planish.__version__
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == {"planish", *(f"planish.{room}" for room in ROOMS)}
    assert set(project["tool"]["setuptools"]["package-data"]["planish"]) == set(DATA)


def test_every_declared_entry_point_loads() -> None:
    scripts = [e for e in entry_points(group="console_scripts") if e.name == "planish"]
    backends = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "planish"]
    assert scripts
    assert backends
    for entry in [*scripts, *backends]:
        assert callable(entry.load())


def test_the_constraints_pin_one_version_each() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all("==" in pin and "/" not in pin and "@" not in pin for pin in pins)
    names = [pin.split("==")[0].lower() for pin in pins]
    assert len(names) == len(set(names))


def run_python(code: str) -> str:
    """A fresh interpreter outside of the checkout, so that nothing shadows a library."""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return ended.stdout.strip()


def test_import_loads_no_torch() -> None:
    code = (
        "import sys, planish; print([m for m in ('torch', 'triton', 'onnx') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_help_loads_no_torch() -> None:
    code = "import sys, planish.cli; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_the_interface_loads_neither_the_onnx_exporter_nor_triton_kernels() -> None:
    """torch itself imports triton where that is installed, so it is our kernels that count."""
    code = (
        "import sys; from planish import trace, optimize, explain, Program; "
        "print([m for m in sys.modules if m == 'planish.kernels.activation' or m.split('.')[0] in "
        "('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'transformers')])"
    )
    assert run_python(code) == "[]"


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import planish; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(5)) < 0.3
