"""Output folders appear whole or not at all; the catalog of targets; planish.json."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from planish.codegen.bundle import MANIFEST, write_bundle
from planish.codegen.target import catalog, export_program, find_target
from planish.ir.capture import capture_module
from planish.ir.errors import (
    OutputExists,
    OutputNotWritable,
    PatternError,
    UnknownOption,
    UnknownTarget,
    WrongOption,
)
from planish.ir.program import Program
from torch import nn


def _fill(text: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "inner").mkdir()
        (folder / "inner" / "data.bin").write_text(text)
        return {"recipe": text}

    return write


def _fail(error: BaseException) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "half.bin").write_text("half")
        raise error

    return write


def _everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "a" / "out", _fill("one"))
    assert _everything(folder) == ["inner", "inner/data.bin", MANIFEST]
    told = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256(b"one").hexdigest()
    assert told == {"recipe": "one", "files": {"inner/data.bin": {"bytes": 3, "sha256": digest}}}


def test_the_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert write_bundle(tmp_path / "out", _fill("one")).stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out", _fill("one"))
    called: list[Path] = []
    with pytest.raises(OutputExists, match="exists") as told:
        write_bundle(folder, lambda place: called.append(place) or {})
    assert (str(folder), "--force") == (told.value.where, "--force") and "--force" in told.value.fix
    assert called == [] and (folder / "inner" / "data.bin").read_text() == "one"


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out", _fill("one"))
    (folder / "stale").write_text("old")
    write_bundle(folder, _fill("two"), force=True)
    assert _everything(tmp_path) == ["out", "out/inner", "out/inner/data.bin", f"out/{MANIFEST}"]
    assert (folder / "inner" / "data.bin").read_text() == "two"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("existing", [False, True])
def test_whatever_ends_it_early_leaves_nothing_half_written(
    error: BaseException, existing: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "deep" / "out"
    if existing:
        write_bundle(folder, _fill("one"))
    before = _everything(tmp_path)
    with pytest.raises(type(error)):
        write_bundle(folder, _fail(error), force=True)
    assert _everything(tmp_path) == before


def test_an_interrupted_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path / "out", _fill("one"))
    before, rename = _everything(tmp_path), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(folder, _fill("two"), force=True)
    assert _everything(tmp_path) == before
    assert (folder / "inner" / "data.bin").read_text() == "one"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_told_as_such(number: int, tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritable, match="cannot be written") as told:
        write_bundle(tmp_path / "out", _fail(OSError(number, os.strerror(number))))
    assert told.value.found == os.strerror(number)
    assert _everything(tmp_path) == []


def test_other_system_errors_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "out", _fail(FileNotFoundError(errno.ENOENT, "weights are gone")))


def test_a_parent_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritable, match="cannot be written"):
        write_bundle(tmp_path / "file" / "out", _fill("one"))
    with pytest.raises(OutputExists, match="is a file"):
        write_bundle(tmp_path / "file", _fill("one"), force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputNotWritable, match="cannot be written"):
            write_bundle(tmp_path / "out", _fill("one"))
    finally:
        tmp_path.chmod(0o700)


def test_force_never_replaces_the_current_folder_or_one_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path(), tmp_path):
        with pytest.raises(OutputExists, match="more than an export"):
            write_bundle(folder, _fill("one"), force=True)
    assert write_bundle(Path("out"), _fill("one")) == tmp_path / "here" / "out"


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def slow(place: Path) -> dict[str, Any]:
        (folder / "theirs").mkdir(parents=True)
        return {}

    with pytest.raises(OutputExists, match="exists"):
        write_bundle(folder, slow)
    assert _everything(tmp_path) == ["out", "out/theirs"]


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_module(nn.Linear(7, 3), (torch.randn(2, 7),))


def test_an_export_tells_what_it_is(program: Program, tmp_path: Path) -> None:
    metadata = {"recipe": "exact", "options": {"smooth.alpha": 0.7}}
    folder = export_program(program, tmp_path / "out", "onnx", metadata=metadata)
    told = json.loads((folder / MANIFEST).read_text())
    assert told["recipe"] == "exact" and told["options"] == {"smooth.alpha": 0.7}
    assert (told["target"], told["profile"]) == ("onnx", "ort")
    assert told["target_options"] == {
        "activations": "float",
        "logits": "all",
        "attention": "onnx",
    }
    assert told["inputs"] == [{"name": "input_1", "dtype": "f32", "shape": "[*, 7]"}]
    assert told["history"] == [] and told["parameters"] == 24
    assert set(told["files"]) <= {"model.onnx", "model.onnx.data"}
    assert {"torch", "onnx", "onnxruntime"} <= set(told["versions"])


def test_further_files_join_the_export_before_it_is_in_place(
    program: Program, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def extra(folder: Path, sections: Mapping[str, Any]) -> dict[str, Any]:
        assert (folder / "model.onnx").exists() and not out.exists()
        (folder / "tokenizer.json").write_text("{}")
        return {"generation": {"stop": [2]}}

    told = json.loads((export_program(program, out, "onnx", extra=extra) / MANIFEST).read_text())
    assert told["generation"] == {"stop": [2]} and "tokenizer.json" in told["files"]

    def failing(folder: Path, sections: Mapping[str, Any]) -> None:
        raise KeyError("no tokenizer")

    with pytest.raises(KeyError):
        export_program(program, tmp_path / "none", "onnx", extra=failing)
    assert not (tmp_path / "none").exists()


def test_a_wrong_name_is_refused_before_anything_is_written(
    program: Program, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UnknownTarget, match="did you mean onnx"):
        export_program(program, out, "onx")
    with pytest.raises(UnknownTarget, match=r"bundle\.py declares no TARGET"):
        export_program(program, out, "bundle")
    with pytest.raises(UnknownOption, match="did you mean standard"):
        export_program(program, out, "onnx", profile="standart")
    with pytest.raises(UnknownOption, match="did you mean activations"):
        export_program(program, out, "onnx", options={"activation": "int8"})
    with pytest.raises(WrongOption, match="no value 'int4'"):
        export_program(program, out, "onnx", options={"activations": "int4"})
    assert _everything(tmp_path) == []


def test_the_catalog_reads_files_without_importing_them(tmp_path: Path) -> None:
    assert catalog()["onnx"] == "onnx"
    assert find_target("onnx").profiles == ("ort", "standard")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "some.py").write_text('raise SystemExit\nTARGET = Target(name="mine")\n')
    assert catalog(tmp_path) == {"mine": "some"}


@pytest.mark.parametrize("text", ["TARGET = Target(name)", "TARGET = 3", 'TARGET = T("mine")'])
def test_a_wrong_declaration_is_told_by_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text('\nTARGET = Target("mine")\n')
    (tmp_path / "wrong.py").write_text(f"\n{text}\n")
    with pytest.raises(PatternError, match="declared wrongly") as told:
        catalog(tmp_path)
    assert told.value.where.endswith("wrong.py")
