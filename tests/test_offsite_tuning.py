"""offsite_cut and plug_adapters: a smaller model of the same layers, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from planish.ir.errors import WrongOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.program_folder import save_program
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.keep_layers import CannotCutLayers
from planish.passes.offsite_tuning import CannotPlug, OffsiteCut, PlugAdapters, kept_layers
from planish.passes.pipeline import Pipeline
from safetensors.torch import save_file
from speculation import prompt, raised

MODELS: list[tuple[str, zoo.Attention]] = [("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager")]
IDS = torch.tensor([prompt(17), prompt(17, 1)])
LAYERS = 5


def cut(name: str, attention: zoo.Attention, adapters: int = 1, emulator: int = 1) -> Program:
    return Pipeline([OffsiteCut(adapters, emulator)]).run(raised(name, attention, LAYERS))


def renamed(name: str, kept: list[int]) -> dict[str, str]:
    """Names of the whole model's weights as those of a model with the kept layers alone."""
    found: dict[str, str] = {}
    for place, layer in enumerate(kept):
        for stem in ("layers.", "h."):
            if f"{stem}{layer}." in name and name.split(stem)[1].startswith(f"{layer}."):
                found[name] = name.replace(f"{stem}{layer}.", f"{stem}{place}.", 1)
    return found


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_it_is_the_model_of_these_layers(name: str, attention: zoo.Attention) -> None:
    """Layers 0, 2 and 4 of five are the model of three layers with their weights."""
    program = cut(name, attention)
    whole = zoo.build(name, attention, layers=LAYERS).model.state_dict()
    small = zoo.build(name, attention, layers=3).model
    state = small.state_dict()
    for key, value in whole.items():
        for new in renamed(key, [0, 2, 4]).values():
            state[new] = value
    for key in state.keys() & whole.keys() - {k for k in state if ".layers." in k or ".h." in k}:
        state[key] = whole[key]
    small.load_state_dict(state)
    wide = run(program, [IDS], float64=True)[0]
    gap = (run(program, [IDS])[0] - wide).norm() / wide.norm()
    with torch.no_grad():
        wanted = small(input_ids=IDS).logits
    if name != "gemma2":  # whose layers alternate, and the third of three is not like the fifth
        assert (wanted - wide).norm() / wide.norm() <= 4 * gap
    assert program.metadata["offsite"]["kept"] == [0, 2, 4]
    assert program.parameter_count() < raised(name, attention, LAYERS).parameter_count()


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_the_adapter_is_all_weights_of_the_outer_layers(
    name: str, attention: zoo.Attention
) -> None:
    names = cut(name, attention).metadata["offsite"]["weights"]
    stem = "h" if name == "gpt2" else "layers"
    whole = raised(name, attention, LAYERS).weights
    wanted = [n for n in whole if f".{stem}.0." in n or f".{stem}.4." in n]
    assert names == sorted(n for n in wanted if whole.dtype(n).is_floating_point)


@pytest.mark.parametrize("as_program", [True, False])
def test_tuned_layers_go_back(as_program: bool, tmp_path: Path) -> None:
    whole = raised("llama", "sdpa", LAYERS)
    program = cut("llama", "sdpa")
    names = program.metadata["offsite"]["weights"]
    torch.manual_seed(0)
    tuned = {n: whole.weights[n] + 0.1 * torch.randn(whole.weights.shape(n)) for n in names}
    if as_program:
        for name, tensor in tuned.items():
            program.weights[name] = tensor
        path = save_program(program, tmp_path / "tuned")
    else:
        path = tmp_path / "tuned.safetensors"
        save_file(tuned, path)
    after = Pipeline([PlugAdapters(str(path))], verify="numbers").run(whole)
    for name in whole.weights:
        wanted = tuned.get(name, whole.weights[name])
        assert torch.equal(after.weights[name], wanted)
    assert len(after.history.records[-1].applied) == len(names)


@given(st.integers(3, 40), st.data())
def test_kept_layers_are_spread(count: int, data: st.DataObject) -> None:
    adapters = data.draw(st.integers(1, (count - 1) // 2))
    emulator = data.draw(st.integers(1, count - 2 * adapters))
    kept = kept_layers(count, adapters, emulator)
    assert kept == sorted(set(kept))
    assert len(kept) == 2 * adapters + emulator
    assert {*range(adapters), *range(count - adapters, count)} <= set(kept)
    gaps = [b - a for a, b in zip(kept[adapters:-adapters], kept[adapters + 1 :], strict=False)]
    inner = gaps[: emulator - 1]
    assert not inner or max(inner) - min(inner) <= 1


def test_bad_input(tmp_path: Path) -> None:
    whole = raised("llama", "sdpa", LAYERS)
    with pytest.raises(WrongOption, match=r"5 layers cannot become 2 \+ 4 \+ 2"):
        Pipeline([OffsiteCut()]).run(whole)
    with pytest.raises(WrongOption, match="adapters from 1 to 2"):
        Pipeline([OffsiteCut(3, 1)]).run(whole)
    with pytest.raises(CannotCutLayers, match="has a KV cache already"):
        Pipeline([InsertKvCache(), OffsiteCut(1, 1)]).run(whole)
    with pytest.raises(WrongOption, match="no tuned layers"):
        Pipeline([PlugAdapters()]).run(whole)
    path = tmp_path / "other.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.zeros(3, 5), "elsewhere": torch.zeros(2)}, path)
    with pytest.raises(CannotPlug, match=r"elsewhere is no weight.*q_proj.weight is \[3, 5\]"):
        Pipeline([PlugAdapters(str(path))]).run(whole)
    folder = save_program(whole, tmp_path / "whole")
    with pytest.raises(CannotPlug, match="without layers to plug in"):
        Pipeline([PlugAdapters(str(folder))]).run(whole)


def test_a_cache_is_inserted_after_the_cut() -> None:
    program = Pipeline([InsertKvCache()]).run(cut("llama", "sdpa"))
    assert len(program.metadata["cache"]["layers"]) == 3
