"""serve_adapters: each row of a batch as its own adapter alone would compute it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import build
import onnxruntime as ort
import planish.ir.adapter_op
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.torch_cpu import compile_program
from planish.ir.errors import PickleRefused, WrongOption
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.read_lora import CannotServe
from planish.ir.text import program_text
from planish.ir.yardstick import WIDE_LIMIT
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.passes.serve_adapters import ServeAdapters
from safetensors.torch import save_file
from torch import Tensor
from two_adapters import TARGETS, base, saved, served

assert planish.ir.adapter_op
ADAPTERS = torch.ops.planish.adapters


@pytest.mark.parametrize("name", TARGETS)
def test_rows_are_those_of_each_adapter_alone(name: str, tmp_path: Path) -> None:
    models = saved(name, tmp_path)
    program = served(base(name), tmp_path)
    inputs = zoo.build(name, "sdpa", layers=1).other_inputs(batch=4, length=7)
    chosen = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    flat = [*inputs.values(), chosen]
    wide = run(program, flat, float64=True)[0]
    found = run(program, flat)[0]
    plain = zoo.build(name, "sdpa", layers=1).model
    everyone = [*models, plain]
    for row, number in enumerate(chosen.tolist()):
        with torch.no_grad():
            wanted = everyone[number](**{k: v[row : row + 1] for k, v in inputs.items()})[0]
        gap = (found[row] - wide[row]).norm() / wide[row].norm()
        assert gap <= 64 * torch.finfo(torch.float32).eps
        assert (wanted[0] - wide[row]).norm() / wide[row].norm() <= 4 * gap


def test_it_is_called_by_keyword_and_compiles(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    program = served(base("llama"), tmp_path)
    inputs = zoo.build("llama", "sdpa", layers=1).other_inputs(batch=2, length=5)
    chosen = torch.tensor([0, 1], dtype=torch.int32)
    wide = run(program, [*inputs.values(), chosen], float64=True)[0]
    gap = (run(program, [*inputs.values(), chosen])[0] - wide).norm()
    out = program(**inputs, adapter=chosen)
    logits = out["logits"] if isinstance(out, dict) else out[0]
    assert (logits - wide).norm() <= gap
    compiled = compile_program(program)(*inputs.values(), chosen)[0]
    assert (compiled - wide).norm() <= 8 * gap


def test_onnx_runs_it(tmp_path: Path) -> None:
    from planish.codegen.target import export_program

    saved("bert", tmp_path)
    program = served(base("bert"), tmp_path)
    inputs = zoo.build("bert", "sdpa", layers=1).other_inputs(batch=3, length=6)
    flat = [*inputs.values(), torch.tensor([1, 0, -1], dtype=torch.int32)]
    folder = export_program(program, tmp_path / "out", "onnx", profile="standard")
    session = ort.InferenceSession(next(folder.rglob("*.onnx")))
    names = [node.name for node in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, flat, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    wide = run(program, flat, float64=True)[0]
    own = (run(program, flat)[0] - wide).norm()
    assert (found - wide).norm() <= 8 * own


def test_with_a_cache(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    program = served(Pipeline([InsertKvCache()]).run(base("llama")), tmp_path)
    whole = served(base("llama"), tmp_path)
    inputs = zoo.build("llama", "sdpa", layers=1).other_inputs(batch=2, length=8)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    chosen = torch.tensor([1, 0], dtype=torch.int32)
    wanted = run(whole, [ids, mask, chosen], float64=True)[0]
    past = empty_past(program, 2)
    rows: list[Tensor] = []
    for begin, end in ((0, 5), (5, 8)):
        flat = [ids[:, begin:end], mask[:, :end], *past, chosen]
        result = run(program, flat, float64=True)
        rows.append(result[0])
        past = result[1:]
    seen = mask.bool()
    assert (torch.cat(rows, 1) - wanted)[seen].abs().max() <= WIDE_LIMIT * wanted[seen].abs().max()


def test_golden_text(tmp_path: Path) -> None:
    def body(x: Any, w: Any) -> Any:
        return op.relu(op.linear(x, w))

    program = build.program(body, {"x": torch.randn(3, 5)}, {"up.weight": torch.randn(7, 5)})
    write(tmp_path, {"up.lora_A.weight": torch.zeros(2, 5), "up.lora_B.weight": torch.zeros(7, 2)})
    after = Pipeline([ServeAdapters(str(tmp_path))]).run(program)
    assert program_text(after) == (
        "%x : f32[n0, 5]\n"
        "%adapter : i32[n0]\n"
        "%linear = linear(%x, %up.weight) : f32[n0, 7]\n"
        "%adapters = adapters(%linear, %x, %up.adapters_a, %up.adapters_b, %up.adapters_scale, "
        "%adapter) : f32[n0, 7]\n"
        "%relu = relu(%adapters) : f32[n0, 7]\n"
        "return [%relu]"
    )


@given(
    st.lists(st.integers(-1, 2), min_size=1, max_size=5),
    st.sampled_from([(), (4,), (2, 3)]),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_operation(
    chosen: list[int], between: tuple[int, ...], seed: int, joined: bool
) -> None:
    """Each row is y + scale B (A x) of its own adapter; what the others hold does not matter."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.float64)

    batch = len(chosen)
    x, y = drawn(batch, *between, 5), drawn(batch, *between, 7)
    a, b, scale = drawn(3, 2, 5), drawn(3, 7, 2), drawn(3)
    unused = [n for n in range(3) if n not in chosen]
    for number in unused:
        a[number] = float("nan")
    numbers = torch.tensor(chosen, dtype=torch.int32)
    given = (x.flatten(0, -2), y.flatten(0, -2)) if joined and between else (x, y)
    found = ADAPTERS(given[1], given[0], a, b, scale, numbers).reshape(y.shape)
    for row, number in enumerate(chosen):
        wanted = y[row]
        if number >= 0:
            wanted = wanted + scale[number] * (x[row] @ a[number].T @ b[number].T)
        torch.testing.assert_close(found[row], wanted, rtol=1e-12, atol=1e-12)


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, _file(folder))


def _file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def test_bad_adapters(tmp_path: Path) -> None:
    step = ServeAdapters(str(tmp_path))
    good = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 48),
        "model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(60, 2),
    }

    def refused(match: str, tensors: dict[str, Tensor] = good, **config: Any) -> None:
        write(tmp_path, tensors, **config)
        with pytest.raises(CannotServe, match=match):
            Pipeline([step]).run(base("llama"))

    with pytest.raises(WrongOption, match="no adapters"):
        Pipeline([ServeAdapters()]).run(base("llama"))
    refused("use_dora: DoRA scales the whole weight", use_dora=True)
    refused("modules_to_save", modules_to_save=["lm_head"])
    refused("init_lora_weights=pissa: what it took out", init_lora_weights="pissa")
    refused("use_qalora: its factors act on pooled inputs", use_qalora=True)
    refused("LOHA", peft_type="LOHA")
    elsewhere = {key.replace("layers.0", "layers.7"): value for key, value in good.items()}
    refused(r"layers\.7\.self_attn\.q_proj has no matmul", elsewhere)
    wide = {
        key: torch.zeros(value.shape[0], 2 if "B" in key else 50) for key, value in good.items()
    }
    refused(r"q_proj is \[60, 50\], the weight \[60, 48\]", wide)
    refused("comes with the adapter", {**good, "lm_head.base_layer.weight": torch.zeros(97, 48)})
    halves = {key: value for key, value in good.items() if "A" in key}
    refused("lora_B None", halves)
    write(tmp_path, good)
    _file(tmp_path).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PickleRefused):
        Pipeline([step]).run(base("llama"))
