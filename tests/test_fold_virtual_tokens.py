"""fold_prefix and fold_prompts: PEFT's own outputs, in one call and in pieces, and bad folders."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from planish.ir.capture import capture_module
from planish.ir.errors import PickleRefused, SourceNotFound, WrongOption, WrongOrder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_virtual_tokens import NotVirtualTokens
from planish.ir.text import program_text
from planish.passes.constant_past import CannotFold
from planish.passes.fold_prefix import FoldPrefix
from planish.passes.fold_prompts import FoldPrompts
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from safetensors.torch import save_file
from torch import Tensor

TOKENS, LENGTH = 4, 11
CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
KINDS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: peft.PrefixTuningConfig(**CAUSAL),
    "p-tuning v2": lambda: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=20, **CAUSAL
    ),
    "prompt": lambda: peft.PromptTuningConfig(**CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=20, **CAUSAL),
}


@functools.cache
def base(name: str, masked: bool) -> Program:
    made = zoo.build(name, "sdpa", layers=2)
    kwargs = dict(made.kwargs) if masked else {"input_ids": made.kwargs["input_ids"]}
    return pipeline("raise").run(capture_module(made.model, (), kwargs))


def adapter(name: str, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(zoo.build(name, "sdpa", layers=2).model, config).eval()
    model.save_pretrained(folder)
    return model


def text(masked: bool) -> dict[str, Tensor]:
    """Three texts; with a mask, the second one is padded on the left."""
    ids = torch.randint(1, 97, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def in_pieces(program: Program, inputs: dict[str, Tensor], *, float64: bool = False) -> Tensor:
    rows: list[Tensor] = []
    past = empty_past(program, 3)
    for begin, end in ((0, 5), (5, 6), (6, LENGTH)):
        given = [inputs["input_ids"][:, begin:end]]
        if "attention_mask" in inputs:
            given.append(inputs["attention_mask"][:, :end])
        result = run(program, [*given, *past], float64=float64)
        rows.append(result[0])
        past = result[1:]
        assert past[0].shape[2] == end  # of the text alone
    return torch.cat(rows, 1)


def same(found: Tensor, wanted: Tensor, wide: Tensor, masked: bool) -> None:
    """PEFT's float32 outputs lie where our float32 outputs do, around the float64 run."""
    seen = text(True)["attention_mask"].bool() if masked else torch.ones(3, LENGTH).bool()
    found, wanted, wide = found[seen], wanted[seen], wide[seen]
    gap = (found - wide).norm() / wide.norm()
    assert (wanted - wide).norm() / wide.norm() <= 4 * gap
    assert gap <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", kind) for kind in KINDS] + [("gpt2", "prefix"), ("gpt2", "prompt")],
)
def test_virtual_tokens_precede_the_cache(
    name: str, kind: str, masked: bool, tmp_path: Path
) -> None:
    model = adapter(name, KINDS[kind](), tmp_path)
    fold = FoldPrefix if kind in ("prefix", "p-tuning v2") else FoldPrompts
    program = Pipeline([InsertKvCache(), fold(str(tmp_path))]).run(base(name, masked))
    inputs = text(masked)
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -LENGTH:]
    wide = in_pieces(program, inputs, float64=True)
    same(in_pieces(program, inputs), wanted, wide, masked)
    once = run(program, [*inputs.values(), *empty_past(program, 3)])[0]
    same(once, wanted, wide, masked)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_are_constant_embeddings_without_a_cache(name: str, tmp_path: Path) -> None:
    model = adapter(name, KINDS["prompt"](), tmp_path)
    program = Pipeline([FoldPrompts(str(tmp_path))]).run(base(name, True))
    inputs = text(True)
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -LENGTH:]
    wide = run(program, list(inputs.values()), float64=True)[0]
    same(run(program, list(inputs.values()))[0], wanted, wide, True)
    assert "%prompts = weight : f32[1, 4, 48]" in program_text(program, weights=True)


def test_an_encoder_takes_prompts_too(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=TOKENS)
    model = adapter("bert", config, tmp_path)
    program = Pipeline([FoldPrompts(str(tmp_path))]).run(base("bert", True))
    inputs = text(True)
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state[:, -LENGTH:]
    wide = run(program, list(inputs.values()), float64=True)[0]
    same(run(program, list(inputs.values()))[0], wanted, wide, True)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_captured_prompts_are_computed_once(kind: str, tmp_path: Path) -> None:
    model = adapter("llama", KINDS[kind](), tmp_path)
    made = zoo.build("llama", "sdpa", layers=2)
    before = pipeline("exact").run(capture_module(model, (), made.kwargs))
    after = Pipeline([FoldPrompts()]).run(before)
    assert after.weights.shape("prompts") == (1, TOKENS, 48)
    assert not any("prompt_encoder" in name for name in after.weights)
    inputs = list(text(True).values())
    assert torch.equal(run(after, inputs)[0], run(before, inputs)[0])


def test_the_interface_and_the_context(tmp_path: Path) -> None:
    adapter("gpt2", KINDS["prefix"](), tmp_path)
    before = Pipeline([InsertKvCache()]).run(base("gpt2", True))
    after = Pipeline([FoldPrefix(str(tmp_path))]).run(before)
    assert after.input_specs == before.input_specs
    assert (after.in_spec, after.out_spec) == (before.in_spec, before.out_spec)
    assert after.metadata["cache"]["context"] == before.metadata["cache"]["context"] - TOKENS
    assert after.weights.shape("prefix.key_0") == (1, 6, TOKENS, 8)


def written(folder: Path, kind: str, tensors: dict[str, Tensor], tokens: int = TOKENS) -> str:
    config = {"peft_type": kind, "num_virtual_tokens": tokens}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def test_bad_folders(tmp_path: Path) -> None:
    cached = Pipeline([InsertKvCache()]).run(base("llama", True))

    def fold(step: FoldPrefix | FoldPrompts) -> None:
        Pipeline([step]).run(cached)

    for step in (FoldPrefix(), FoldPrompts()):
        with pytest.raises(WrongOption, match="was given no adapter"):
            fold(step)
    with pytest.raises(SourceNotFound, match="no adapter"):
        fold(FoldPrefix(str(tmp_path)))
    folder = written(tmp_path, "LORA", {"a": torch.zeros(2, 3)})
    with pytest.raises(NotVirtualTokens, match="LORA"):
        fold(FoldPrefix(folder))
    written(tmp_path, "PREFIX_TUNING", {"a": torch.zeros(2, 3)})
    with pytest.raises(NotVirtualTokens, match="no virtual tokens"):
        fold(FoldPrefix(folder))
    written(tmp_path, "PREFIX_TUNING", {"prompt_embeddings": torch.zeros(3, 80)})
    with pytest.raises(NotVirtualTokens, match="contradicts"):
        fold(FoldPrefix(folder))
    written(tmp_path, "PREFIX_TUNING", {"prompt_embeddings": torch.zeros(TOKENS, 96)})
    with pytest.raises(CannotFold, match="2 layers x 2 x 2 heads x 10 = 80"):
        fold(FoldPrefix(folder))
    written(tmp_path, "PROMPT_TUNING", {"prompt_embeddings": torch.zeros(TOKENS, 96)})
    with pytest.raises(CannotFold, match="embeddings of 48 numbers"):
        fold(FoldPrompts(folder))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PickleRefused, match="pickle"):
        fold(FoldPrompts(folder))


def test_a_prefix_needs_a_cache_that_grows(tmp_path: Path) -> None:
    folder = written(tmp_path, "PREFIX_TUNING", {"prompt_embeddings": torch.zeros(TOKENS, 80)})
    with pytest.raises(WrongOrder, match="cached"):
        Pipeline([FoldPrefix(folder)]).run(base("llama", True))
    with pytest.raises(CannotFold, match="does not grow"):
        Pipeline([InsertKvCache(static=40), FoldPrefix(folder)]).run(base("llama", True))
