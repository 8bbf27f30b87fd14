"""Packages of the triton target: what is in them, what they refuse, and their machine code run."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import build
import planish
import pytest
import torch
from planish.codegen.package_runner import Binaries, Package, PackageRefused, check, load
from planish.codegen.target import export_program
from planish.ir.errors import UnknownOption, UnsupportedByTarget, WrongOption
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.kernels.ptx_execute import execute
from torch import Tensor, nn

TESTS = Path(__file__).parent
STANDARD = {"torch", "triton", *sys.stdlib_module_names}


class Block(nn.Module):
    """A residual block of uneven widths: norm, two projections, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x + self.down(torch.relu(self.up(self.norm(x)))), -1)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    return planish.optimize(model, (numbers(2, 5, 24),), recipe="exact").program


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "block"
    options = {"arch": "sm_80,gfx942", "lengths": "7"}
    return export_program(program, folder, "triton", options=options)


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "block"))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "planish.json").read_text())


def rewrite(folder: Path, change: Any) -> None:
    told = manifest(folder)
    change(told)
    (folder / "planish.json").write_text(json.dumps(told))


def test_what_a_package_holds(exported: Path) -> None:
    told = manifest(exported)["triton"]
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*")}
    assert {"runner.py", "model.py", "generated.py", "weights.safetensors", "buffers.json"} <= names
    assert sum(n for name, n in told["launches"].items() if name.endswith("split_kernel")) == 2
    for arch, kind in (("sm_80", "cubin"), ("gfx942", "hsaco")):
        files = {f for variant in told["binaries"][arch] for f in variant["files"]}
        assert files <= names
        assert any(f.endswith(kind) for f in files)
    assert any(f.endswith(".ptx") for f in names)
    peak = json.loads((exported / "buffers.json").read_text())["peak"]["bytes"]
    assert peak >= 2 * 5 * (24 + 40) * 4


def test_the_sources_import_nothing_but_torch_and_triton(exported: Path) -> None:
    for file in exported.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in STANDARD for alias in node.names), file
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in STANDARD, file


def test_generated_kernels_say_what_they_were_made_of(exported: Path) -> None:
    text = (exported / "generated.py").read_text()
    assert "%relu" in text or "%up" in text
    assert "from up" in text or "from norm" in text


class Simulated:
    """A driver that executes the PTX beside each cubin on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.text = {f.read_bytes(): f.with_suffix(".ptx") for f in folder.rglob("*.cubin")}
        self.races = self.launches = 0

    def load(self, code: bytes, name: str, shared: int) -> str:
        text = self.text[code].read_text()
        assert f".entry {name}(" in text
        return text

    def launch(
        self,
        function: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        kinds: Sequence[str],
        values: Sequence[Any],
    ) -> None:
        assert [kind.startswith("*") for kind in kinds] == [isinstance(v, Tensor) for v in values]
        done = execute(function, grid, values, threads=threads, shared=shared)
        self.races += done.races
        self.launches += 1


@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 5, 24), (9, 5, 24)])
def test_the_machine_code_computes_the_program(
    program: Program, exported: Path, shape: tuple[int, ...]
) -> None:
    """Launches at captured, at precompiled and at other sizes all find a binary that fits."""
    loaded = load(exported, "cpu")
    driver = Simulated(exported)
    kept = loaded.section["binaries"]["sm_80"]
    binaries = loaded.launcher = Binaries(exported, kept, driver)
    x = numbers(*shape)
    (got,) = loaded(x)
    (own,), (exact,) = run(program, [x]), run(program, [x], float64=True)
    assert binaries.missed == {}
    if shape == (2, 5, 24):
        assert driver.launches == sum(manifest(exported)["triton"]["launches"].values())
    assert driver.races == 0
    allowed = 4 * (own.double() - exact).abs().max() + 2**-22
    assert (got.double() - exact).abs().max() <= allowed


def test_a_launch_that_no_binary_fits_is_compiled_when_it_comes_up(exported: Path) -> None:
    loaded = load(exported, "cpu")
    binaries = Binaries(exported, [], Simulated(exported))
    launched: list[str] = []

    class Launch:
        name = "unknown"
        num_warps = num_stages = 1

        def __init__(self) -> None:
            self.args: dict[str, Any] = {}

        def fixed(self) -> dict[str, Any]:
            return {}

        def signature(self) -> dict[str, str]:
            return {}

        def aligned(self) -> tuple[str, ...]:
            return ()

        def run(self) -> None:
            launched.append(self.name)

    binaries(Launch())
    assert launched == ["unknown"]
    assert binaries.missed == {"unknown": 1}
    assert isinstance(loaded, Package)


def test_an_input_that_is_a_constant_is_written_down(tmp_path: Path) -> None:
    """The package is called with the tensors alone."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float, flag: bool) -> Tensor:
            return torch.relu(x) * factor if flag else x

    x = numbers(2, 5, 24)
    made = planish.optimize(Scaled(), (x, 0.5, True), recipe="exact").program
    folder = export_program(made, tmp_path / "out", "triton", options={"arch": "sm_80"})
    loaded = load(folder, "cpu")
    loaded.launcher = Binaries(folder, loaded.section["binaries"]["sm_80"], Simulated(folder))
    (got,) = loaded(x)
    torch.testing.assert_close(got, torch.relu(x) * 0.5)


def spoiled(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["model.py", "weights.safetensors", "kernels/launch.py"])
def test_a_changed_file_is_refused(package: Path, name: str) -> None:
    spoiled(package, name)
    with pytest.raises(PackageRefused, match="was changed"):
        load(package)


def test_a_missing_file_is_refused(package: Path) -> None:
    (package / "generated.py").unlink()
    with pytest.raises(PackageRefused, match=r"generated.py is missing"):
        load(package)


@pytest.mark.parametrize("name", ["../outside.py", "/etc/hostname", "kernels/../../outside.py"])
def test_a_file_outside_of_the_folder_is_refused(package: Path, name: str) -> None:
    (package.parent / "outside.py").write_text("x = 1\n")
    rewrite(package, lambda told: told["files"].update({name: {"bytes": 6, "sha256": "0"}}))
    with pytest.raises(PackageRefused, match="outside of its folder"):
        check(package)


def test_a_link_out_of_the_folder_is_refused(package: Path) -> None:
    (package.parent / "outside.py").write_bytes((package / "model.py").read_bytes())
    (package / "model.py").unlink()
    (package / "model.py").symlink_to(package.parent / "outside.py")
    with pytest.raises(PackageRefused, match="outside of its folder"):
        check(package)


def test_code_that_the_manifest_does_not_list_is_refused(package: Path) -> None:
    (package / "more.py").write_text("x = 1\n")
    rewrite(package, lambda told: told["triton"]["modules"].append("more.py"))
    with pytest.raises(PackageRefused, match=r"more.py, which it does not list"):
        check(package)


def test_another_triton_is_refused(package: Path) -> None:
    rewrite(package, lambda told: told["triton"].update({"triton": "3.1"}))
    with pytest.raises(PackageRefused, match=r"verified with triton 3.1"):
        check(package)


def test_another_format_is_refused(package: Path) -> None:
    rewrite(package, lambda told: told["triton"].update({"format": 99}))
    with pytest.raises(PackageRefused, match="format 99"):
        check(package)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageRefused, match="no manifest"):
        load(tmp_path)


def test_wrong_inputs_are_named(exported: Path) -> None:
    loaded = load(exported, "cpu")
    with pytest.raises(ValueError, match="expected 1 inputs"):
        loaded()
    with pytest.raises(ValueError, match=r"expected torch.float32 \[\*, 5, 24\]"):
        loaded(numbers(2, 5, 25))
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        loaded(numbers(2, 5, 24).double())


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"arch": "sm_42"}, UnknownOption, "sm_42"),
        ({"arch": ""}, WrongOption, "no architecture"),
        ({"lengths": "some"}, WrongOption, "numbers of tokens"),
        ({"length": "3"}, UnknownOption, "length"),
    ],
)
def test_wrong_options(
    program: Program, tmp_path: Path, options: dict[str, str], error: type, sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        export_program(program, tmp_path / "out", "triton", options=options)
    assert not (tmp_path / "out").exists()


def test_a_size_that_data_decides_is_refused(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return op.relu(op._to_copy(op.nonzero(x), dtype=torch.float32))

    made = build.program(body, {"x": numbers(4, 24)}, free=False)
    with pytest.raises(UnsupportedByTarget, match="depends on the data"):
        export_program(made, tmp_path / "out", "triton", options={"arch": "sm_80"})
    assert not (tmp_path / "out").exists()


def interpreted(*arguments: str) -> None:
    command = [str(Path(sys.executable).parent / "pytest"), "-q", "tests/interpreted_packages.py"]
    ended = subprocess.run(
        [*command, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]


def test_packages_in_the_interpreter() -> None:
    interpreted("-k", "random or whole_models and llama or either or apart and True-3")


@pytest.mark.slow
def test_further_packages_in_the_interpreter() -> None:
    interpreted("-k", "not random and not either and not (whole_models and llama) and not True-3")


@pytest.mark.slow
def test_a_real_language_model_in_the_interpreter() -> None:
    interpreted("-m", "slow")
