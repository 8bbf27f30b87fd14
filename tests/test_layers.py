"""The rooms import each other in one direction, and nothing lies below a room."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import planish
import pytest

ROOT = Path(planish.__file__).parent
ROOMS = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "kernels": {"ir", "kernels"},
    "codegen": {"ir", "passes", "kernels", "codegen"},
}
HEAVY = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "triton", "peft"}


def imported(file: Path, text: str | None = None) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    text = file.read_text(encoding="utf-8") if text is None else text
    package = ["planish", *file.relative_to(ROOT).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def own_rooms(file: Path, text: str | None = None) -> set[str]:
    """The rooms that a file imports from; "" is the root."""
    rooms: set[str] = set()
    for name in imported(file, text):
        parts = name.split(".")
        if parts[0] != "planish":
            continue
        if len(parts) > 1 and parts[1] in ROOMS:
            rooms.add(parts[1])
        elif len(parts) > 1:
            rooms.add("")
    return rooms


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    wrong = {
        file.name: sorted(own_rooms(file) - ROOMS[room])
        for file in files(room)
        if own_rooms(file) - ROOMS[room]
    }
    assert not wrong


def test_the_reader_of_imports_sees_wrong_ones() -> None:
    text = "from ..passes.contract import Pass\nimport planish.codegen.onnx\nfrom .. import api\n"
    assert own_rooms(ROOT / "ir" / "probe.py", text) == {"passes", "codegen", ""}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_flat(room: str) -> None:
    inside = [p.name for p in (ROOT / room).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert not inside


@pytest.mark.parametrize("room", ["ir", "passes"])
def test_optional_libraries_are_imported_where_they_are_needed(room: str) -> None:
    """At the top of a module of ir or passes they would be needed by everyone."""
    for file in files(room):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name.split(".")[0]
            for node in top
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
        }
        assert not names & HEAVY, file.name


def test_nothing_is_loaded_or_saved_by_pickle() -> None:
    """Of pickle only its error is named; torch.load is called only in its restricted form."""
    for file in [*ROOT.glob("*.py"), *(f for room in ROOMS for f in files(room))]:
        assert not {"cloudpickle", "dill", "joblib", "shelve"} & imported(file), file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle."):
                assert node.attr == "UnpicklingError", file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.save",
            ):
                assert any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True"
                    for word in node.keywords
                ), file


def test_public_names_exist() -> None:
    for name in planish.__all__:
        assert getattr(planish, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        getattr(planish, "no_such_name")  # noqa: B009


def test_this_checkout_is_the_one_that_is_tested() -> None:
    assert Path(__file__).resolve().parent.parent == ROOT
    for room in ROOMS:
        module = importlib.import_module(f"planish.{room}")
        assert Path(str(module.__file__)).parent == ROOT / room
