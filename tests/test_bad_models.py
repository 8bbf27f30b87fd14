"""Damaged, incomplete or dangerous models are refused by one clear error, and run nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from planish.ir import errors
from planish.ir.errors import PlanishError
from planish.ir.read_exported import read_exported
from planish.ir.read_gguf import gguf_folder
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.read_safetensors import read_safetensors
from safetensors.torch import load_file, save_file
from torch import nn

Case = tuple[Callable[[Path], object], Path, type[PlanishError], str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good sharded model, a good single-file one and a good program."""
    folder = tmp_path_factory.mktemp("good")
    model = zoo.build("llama", layers=1).model
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")
    exported = torch.export.export(nn.Linear(5, 3), (torch.randn(2, 5),))
    torch.export.save(exported, folder / "program.pt2")
    return folder


@pytest.fixture
def good(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "models")
    return tmp_path / "models"


def _cut(file: Path, keep: float) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    return file


def _edit(file: Path, **changes: object) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def _with_header(file: Path, header: object) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return file


def _without(folder: Path, name: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def missing_folder(good: Path) -> Case:
    return read_hf_folder, good / "nowhere", errors.SourceNotFound, "no such folder"


def folder_without_config(good: Path) -> Case:
    (good / "single" / "config.json").unlink()
    return read_hf_folder, good / "single", errors.SourceNotFound, "no config.json"


def folder_without_weights(good: Path) -> Case:
    (good / "single" / "model.safetensors").unlink()
    return read_hf_folder, good / "single", errors.SourceNotFound, "no safetensors files"


def config_is_no_json(good: Path) -> Case:
    (good / "single" / "config.json").write_text("{oh")
    return read_hf_folder, good / "single", errors.CorruptFile, "config.json is damaged"


def config_of_something_else(good: Path) -> Case:
    (good / "single" / "config.json").write_text('{"name": "a", "version": 3}')
    return read_hf_folder, good / "single", errors.CorruptFile, "'model_type'"


def unknown_architecture(good: Path) -> Case:
    _edit(good / "single" / "config.json", architectures=["ModelOfTomorrow"])
    return read_hf_folder, good / "single", errors.UnsupportedCheckpoint, "ModelOfTomorrow"


def unknown_model_type(good: Path) -> Case:
    _edit(good / "single" / "config.json", model_type="tomorrow")
    return read_hf_folder, good / "single", errors.UnsupportedCheckpoint, "tomorrow"


def code_in_the_folder(good: Path) -> Case:
    _edit(good / "single" / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    return read_hf_folder, good / "single", errors.UnsupportedCheckpoint, "runs no code"


def quantized_already(good: Path) -> Case:
    _edit(good / "single" / "config.json", quantization_config={"quant_method": "gptq"})
    return read_hf_folder, good / "single", errors.UnsupportedCheckpoint, "gptq"


def truncated_weights(good: Path) -> Case:
    _cut(good / "single" / "model.safetensors", 0.7)
    return read_hf_folder, good / "single", errors.TruncatedFile, "model.safetensors is truncated"


def truncated_header(good: Path) -> Case:
    file = good / "single" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return read_safetensors, file, errors.TruncatedFile, "as its header says"


def empty_weights(good: Path) -> Case:
    file = _cut(good / "single" / "model.safetensors", 0)
    return read_safetensors, file, errors.CorruptFile, "first 8 bytes"


def header_is_garbage(good: Path) -> Case:
    file = _with_header(good / "x.safetensors", b"\xff\x00 not json")
    return read_safetensors, file, errors.CorruptFile, "a header in JSON"


def header_is_a_list(good: Path) -> Case:
    file = _with_header(good / "x.safetensors", [1, 2])
    return read_safetensors, file, errors.CorruptFile, "a JSON object as header"


def header_with_wrong_range(good: Path) -> Case:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}
    file = _with_header(good / "x.safetensors", {"w": entry})
    return read_safetensors, file, errors.CorruptFile, "w: F32[2, 3]"


def header_with_unknown_dtype(good: Path) -> Case:
    entry = {"dtype": "F5", "shape": [2], "data_offsets": [0, 2]}
    file = _with_header(good / "x.safetensors", {"w": entry})
    return read_safetensors, file, errors.UnsupportedCheckpoint, "tensor w has the dtype 'F5'"


def missing_shard(good: Path) -> Case:
    shard = sorted((good / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    return read_hf_folder, good / "sharded", errors.MissingShard, shard.name


def truncated_shard(good: Path) -> Case:
    shard = _cut(sorted((good / "sharded").glob("*.safetensors"))[1], 0.5)
    return read_hf_folder, good / "sharded", errors.TruncatedFile, shard.name


def index_leaves_the_folder(good: Path) -> Case:
    index = good / "sharded" / "model.safetensors.index.json"
    _edit(index, weight_map={"w": "../single/model.safetensors"})
    return read_hf_folder, good / "sharded", errors.CorruptFile, "beside the index"


def index_names_an_absent_tensor(good: Path) -> Case:
    index = good / "sharded" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = next(iter(weight_map.values()))
    _edit(index, weight_map=weight_map | {"ghost.weight": shard})
    return read_hf_folder, good / "sharded", errors.MissingTensor, "ghost.weight"


def missing_tensor(good: Path) -> Case:
    name = "model.layers.0.mlp.up_proj.weight"
    return read_hf_folder, _without(good / "single", name), errors.MissingTensor, name


def shape_unlike_config(good: Path) -> Case:
    _edit(good / "single" / "config.json", intermediate_size=96)
    return read_hf_folder, good / "single", errors.TensorMismatch, "[48, 96]"


def pickle_as_a_folder(good: Path) -> Case:
    file = good / "single" / "model.safetensors"
    torch.save(load_file(file), good / "single" / "pytorch_model.bin")
    file.unlink()
    return read_hf_folder, good / "single", errors.PickleRefused, "pytorch_model.bin is a pickle"


def pickle_as_a_file(good: Path) -> Case:
    torch.save({"w": torch.ones(3)}, good / "weights.pth")
    return read_safetensors, good / "weights.pth", errors.PickleRefused, "run the code"


def gguf_missing(good: Path) -> Case:
    return gguf_folder, good / "nowhere.gguf", errors.SourceNotFound, "no such GGUF file"


def gguf_wrong_magic(good: Path) -> Case:
    (good / "x.gguf").write_bytes(b"GGML" + bytes(100))
    return gguf_folder, good / "x.gguf", errors.CorruptFile, "b'GGML'"


def gguf_wrong_version(good: Path) -> Case:
    (good / "x.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    return gguf_folder, good / "x.gguf", errors.CorruptFile, "version 9"


def _tiny_gguf(file: Path, architecture: str = "llama") -> Path:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_tensor("token_embd.weight", torch.randn(97, 48).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_truncated(good: Path) -> Case:
    file = _cut(_tiny_gguf(good / "x.gguf"), 0.9)
    return gguf_folder, file, errors.TruncatedFile, "token_embd.weight lies past its end"


def gguf_truncated_header(good: Path) -> Case:
    file = _tiny_gguf(good / "x.gguf")
    file.write_bytes(file.read_bytes()[:90])
    return gguf_folder, file, errors.TruncatedFile, "ends within its header"


def gguf_unknown_architecture(good: Path) -> Case:
    file = _tiny_gguf(good / "x.gguf", "tomorrow")
    return gguf_folder, file, errors.UnsupportedCheckpoint, "'tomorrow'"


def program_is_garbage(good: Path) -> Case:
    (good / "program.pt2").write_bytes(b"no zip at all" * 50)
    return read_exported, good / "program.pt2", errors.CorruptFile, "a zip archive"


def program_is_truncated(good: Path) -> Case:
    return read_exported, _cut(good / "program.pt2", 0.6), errors.CorruptFile, "a zip archive"


def program_is_missing(good: Path) -> Case:
    return read_exported, good / "nowhere.pt2", errors.SourceNotFound, "no such file"


def program_is_a_pickle(good: Path) -> Case:
    torch.save({"w": torch.ones(3)}, good / "program.pt2")
    return read_exported, good / "program.pt2", errors.PickleRefused, "data.pkl"


def program_named_as_pickle(good: Path) -> Case:
    shutil.copy(good / "program.pt2", good / "program.pt")
    return read_exported, good / "program.pt", errors.PickleRefused, "program.pt is a pickle"


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("import sys; sys.planish_was_run = True",)


def _replace(file: Path, ending: str, change: Callable[[bytes], bytes]) -> Path:
    """Rewrite one record of a program's archive."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith(ending) else data)
    return file


def program_with_code_in_examples(good: Path) -> Case:
    torch.save((_Payload(),), good / "evil.pt")
    evil = (good / "evil.pt").read_bytes()
    file = _replace(good / "program.pt2", "sample_inputs/model.pt", lambda _: evil)
    return read_exported, file, errors.PickleRefused, "not tensors"


def program_with_pickled_weights(good: Path) -> Case:
    def mark(data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true')

    file = _replace(good / "program.pt2", "weights_config.json", mark)
    return read_exported, file, errors.PickleRefused, "stored as a pickle"


def program_with_opaque_object(good: Path) -> Case:
    with zipfile.ZipFile(good / "program.pt2", "a") as archive:
        evil = pickle.dumps(_Payload())
        archive.writestr("program/data/constants/opaque_obj_0", evil)
    return read_exported, good / "program.pt2", errors.PickleRefused, "opaque_obj_0"


def program_with_code_as_operation(good: Path) -> Case:
    def change(data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.linear.default", b"torch.os.system")

    file = _replace(good / "program.pt2", "models/model.json", change)
    return read_exported, file, errors.UnsupportedCheckpoint, "target: torch.os.system"


def program_with_code_as_shape(good: Path) -> Case:
    size = {"expr_str": "__import__('sys').exit(3)", "hint": {"as_int": 5}}

    def change(data: bytes) -> bytes:
        return data.replace(b'{"as_int": 5}', json.dumps({"as_expr": size}).encode(), 1)

    file = _replace(good / "program.pt2", "models/model.json", change)
    return read_exported, file, errors.UnsupportedCheckpoint, "expr_str: __import__"


def program_with_code_as_name(good: Path) -> Case:
    def change(data: bytes) -> bytes:
        return data.replace(b'"name": "linear"', b'"name": "x = exit(3)"')

    file = _replace(good / "program.pt2", "models/model.json", change)
    return read_exported, file, errors.UnsupportedCheckpoint, "name: x = exit(3)"


def program_without_graph(good: Path) -> Case:
    file = _replace(good / "program.pt2", "models/model.json", lambda _: b"{nothing")
    return read_exported, file, errors.CorruptFile, "JSON in models/model.json"


CASES = [
    value
    for value in list(globals().values())
    if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Case"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_refused(case: Callable[[Path], Case], good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(good / "cache"))
    read, path, kind, sentence = case(good)
    with pytest.raises(PlanishError) as caught:
        read(path)
    assert type(caught.value) is kind
    assert sentence in str(caught.value)
    assert path.name in str(caught.value)
    assert caught.value.fix
    assert not hasattr(sys, "planish_was_run")
    cached = list((good / "cache").rglob("*")) if (good / "cache").exists() else []
    assert not [p for p in cached if p.is_file()]


def test_a_cache_that_cannot_be_written(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("PLANISH_CACHE", str(good / "cache"))
    with pytest.raises(errors.OutputNotWritable, match="PLANISH_CACHE"):
        gguf_folder(_tiny_gguf(good / "x.gguf"))


def test_the_library_is_asked_for(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install planish\[hf\]"):
        read_hf_folder(good / "single")


def test_the_good_ones_are_read(good: Path) -> None:
    single, sharded = read_hf_folder(good / "single"), read_hf_folder(good / "sharded")
    for key, value in single.state_dict().items():
        assert torch.equal(value, sharded.state_dict()[key])
    read_exported(_replace(good / "program.pt2", "nothing", lambda data: data))
