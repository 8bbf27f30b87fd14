"""PEFT folders merged into weights, against PEFT's own merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import captured
import peft
import planish
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_adapters import CASES, LINEAR, LORA, captured_base, trained, weights_gap
from planish.ir.adapter_change import Spot
from planish.ir.adapter_rotation import Rotated
from planish.ir.errors import PickleRefused, PlanishError, WrongOption, WrongOrder
from planish.ir.read_adapter import AdapterMismatch, UnsupportedAdapter
from planish.passes.merge_adapters import MergeAdapters
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    theirs = trained(name, config(), tmp_path).merge_and_unload().state_dict()
    program = captured_base(name)
    merged = Pipeline([MergeAdapters(adapters=str(tmp_path))]).run(program)
    gap = weights_gap(program, merged, theirs)
    assert gap.units <= 4, gap
    assert gap.changed == len(merged.history.records[-1].applied) > 0


def test_several_folders_add_up(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 4)):
        torch.manual_seed(seed)
        model = copy.deepcopy(captured.sample("llama", "eager").model)
        adapted = peft.get_peft_model(model, LORA(r=2, target_modules=["k_proj"]))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / folder)
    base = captured.captured("llama", "eager")
    spelled = f"{tmp_path / 'a'}=0.5; {tmp_path / 'b'}=-2"
    merged = Pipeline([MergeAdapters(adapters=spelled)]).run(base)
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = base.weights[name].double()
    for folder, weight in (("a", 0.5), ("b", -2.0)):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        a, b = (
            found[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"].double()
            for x in "AB"
        )
        wanted = wanted + weight * (8 / 2) * b @ a
    gap = (merged.weights[name].double() - wanted).abs().max()
    assert gap <= 8 * torch.finfo(torch.float32).eps * wanted.abs().max()


def pair(folder: Path, ranks: tuple[int, int] = (3, 3)) -> peft.PeftModel:
    """Two saved adapters of one model."""
    model = copy.deepcopy(captured.sample("llama", "eager").model)
    generator = torch.Generator().manual_seed(5)
    adapted: Any = None
    for name, rank in zip("ab", ranks, strict=True):
        config = LORA(r=rank, lora_alpha=5, target_modules=["k_proj", "down_proj"])
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("linear", 0),
        ("ties", 0),
        ("magnitude_prune", 0),
        ("svd", 4),
        ("ties_svd", 4),
        ("magnitude_prune_svd", 4),
    ],
)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_combinations_equal_those_of_peft(
    method: str, rank: int, sign: Any, tmp_path: Path
) -> None:
    adapted = pair(tmp_path)
    more = {"svd_rank": rank} if rank else {}
    adapted.add_weighted_adapter(
        ["a", "b"],
        [0.7, -1.3],
        "both",
        combination_type=method,
        density=0.4,
        majority_sign_method=sign,
        **more,
    )
    adapted.set_adapter("both")
    theirs = adapted.merge_and_unload().state_dict()
    step = MergeAdapters(
        adapters=f"{tmp_path / 'a'}=0.7; {tmp_path / 'b'}=-1.3",
        combine=method,
        density=0.4,
        sign=sign,
        rank=rank,
    )
    merged = Pipeline([step]).run(captured.captured("llama", "eager"))
    for key in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{key}.weight"
        wide = theirs[name].double()
        gap = (merged.weights[name].double() - wide).abs().max()
        assert gap <= 32 * torch.finfo(torch.float32).eps * wide.abs().max()


def test_dropping_keeps_the_mean(tmp_path: Path) -> None:
    pair(tmp_path)
    base = captured.captured("llama", "eager")
    name = "model.layers.0.mlp.down_proj.weight"
    total = torch.zeros(base.weights.shape(name), dtype=torch.float64)
    adapters = f"{tmp_path / 'a'}; {tmp_path / 'b'}"
    once = Pipeline([MergeAdapters(adapters=adapters)]).run(base)
    plain = once.weights[name].double() - base.weights[name].double()
    runs = 64
    for seed in range(runs):
        step = MergeAdapters(adapters=adapters, combine="dare_linear_svd", density=0.5, seed=seed)
        total += Pipeline([step]).run(base).weights[name].double() - base.weights[name].double()
    # each delta is doubled or dropped: one run is off by about the delta itself, their mean by
    # 1 / sqrt(runs) of it; twice that
    off = (total / runs - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert off < 2 / runs**0.5


def test_factors_of_different_ranks_are_not_combined(tmp_path: Path) -> None:
    pair(tmp_path, (3, 4))
    step = MergeAdapters(adapters=f"{tmp_path / 'a'}; {tmp_path / 'b'}", combine="ties")
    with pytest.raises(WrongOption, match=r"one rank, these have \[3, 4\]"):
        Pipeline([step]).run(captured.captured("llama", "eager"))


def refusal(folder: Path, name: str = "llama") -> PlanishError:
    with pytest.raises(PlanishError) as raised:
        Pipeline([MergeAdapters(adapters=str(folder))]).run(captured.captured(name, "eager"))
    return raised.value


def test_an_adapter_of_another_base_lists_what_does_not_fit(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=LINEAR), tmp_path)
    error = refusal(tmp_path, "gpt2")
    assert isinstance(error, AdapterMismatch)
    assert str(error).count("the base has no weight") == 10 and "and 4 more" in str(error)


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_A" in k)
    tensors[key] = tensors[key][:3].contiguous()
    save_file(tensors, file)
    error = refusal(tmp_path)
    assert isinstance(error, AdapterMismatch) and "ranks differ: A is [3, 48]" in str(error)


def test_a_configuration_of_another_rank_is_refused(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 16}))
    error = refusal(tmp_path)
    assert isinstance(error, AdapterMismatch)
    assert "rank 16 in the configuration, 4 in the tensors" in str(error)


def test_a_missing_factor_is_named(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(k for k in tensors if "layers.1" in k and "lora_B" in k)]
    save_file(tensors, file)
    assert "layers.1.self_attn.q_proj: the adapter lacks lora_B.weight" in str(refusal(tmp_path))


def test_unknown_kinds_and_variants_are_named(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "peft_type": "BOFT"}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedAdapter) and "kind BOFT" in str(error)
    file.write_text(json.dumps({**config, "use_qalora": True}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedAdapter) and "use_qalora" in str(error)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.0, 1e-300, 1.0, 100.0]))
def test_rotations_keep_lengths(size: int, blocks: int, scale: float) -> None:
    """The Cayley transform is orthogonal for any values, so each output keeps its norm."""
    generator = torch.Generator().manual_seed(size)
    count = size * (size - 1) // 2
    values = scale * torch.randn(blocks, count, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, size * blocks, generator=generator, dtype=torch.float64)
    spot = Spot("up.weight", (4, size * blocks), -1)
    change = Rotated(values, terms=0)
    assert change.misfit(spot) is None
    turned = change.apply(weight, weight, spot)
    # solving with I + Q, whose condition is below 1 + |Q|, loses that many roundings
    bound = 64 * torch.finfo(torch.float64).eps * (1 + values.norm())
    assert ((turned.norm(dim=1) / weight.norm(dim=1)) - 1).abs().max() <= bound


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])
    trained("llama", config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v[:-1].contiguous() for k, v in load_file(file).items()}, file)
    assert "11 blocks of 4 inputs, but the base's is [60, 48]" in str(refusal(tmp_path))


def test_pickles_are_refused(tmp_path: Path) -> None:
    trained("llama", LORA(r=4, target_modules=["q_proj"]), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert isinstance(refusal(tmp_path), PickleRefused)


def test_directions_that_training_dropped_are_gone(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=7, total_step=9, target_modules=["q_proj"])
    adapted = trained("llama", config, tmp_path)
    place = "model.layers.{}.self_attn.q_proj.lora_E"
    pattern = {place.format(0): [True, False, True, True], place.format(1): [False] * 4}
    adapted.peft_config["default"].rank_pattern = {f"{k}.default": v for k, v in pattern.items()}
    adapted.save_pretrained(tmp_path)
    model = copy.deepcopy(captured.sample("llama", "eager").model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    base = captured.captured("llama", "eager")
    merged = Pipeline([MergeAdapters(adapters=str(tmp_path))]).run(base)
    gap = weights_gap(base, merged, theirs)
    assert gap.units <= 4 and gap.changed == 1, gap
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "rank_pattern": {place.format(0): [True] * 4}}))
    assert "rank 4 in the configuration, 3 in the tensors" in str(refusal(tmp_path))


def test_an_output_projection_is_no_packed_attention_by_its_name(tmp_path: Path) -> None:
    """PEFT doubles the branch of an output only where it wrapped the attention itself."""
    theirs = trained("siglip", LORA(r=4, target_modules=["self_attn.out_proj"]), tmp_path)
    base = captured_base("siglip")
    merged = Pipeline([MergeAdapters(adapters=str(tmp_path))]).run(base)
    gap = weights_gap(base, merged, theirs.merge_and_unload().state_dict())
    assert gap.units <= 4 and gap.changed == 1, gap


def test_quantizing_first_is_refused_with_the_right_order(tmp_path: Path) -> None:
    steps = [QuantizeWeights(bits=8), MergeAdapters(adapters=str(tmp_path))]
    with pytest.raises(WrongOrder, match="run merge_adapters before quantize_weights"):
        Pipeline(steps).run(captured.captured("llama", "eager"))


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(WrongOption, match="no number"):
        MergeAdapters(adapters="style/=much").folders()


def test_optimize_takes_folders(tmp_path: Path) -> None:
    theirs = trained("llama", LORA(r=4, target_modules=LINEAR), tmp_path).merge_and_unload()
    sample = zoo.build("llama", "eager")
    optimized = planish.optimize(
        sample.model, sample.args, sample.kwargs, recipe="exact", adapters=[tmp_path]
    )
    inputs = sample.other_inputs()
    with torch.no_grad():
        wanted = theirs(**inputs, use_cache=False)[0]
    found = optimized.program(**inputs)["logits"]
    kept = inputs["attention_mask"].bool()
    gap = (found - wanted)[kept].abs().max()
    assert gap <= 64 * torch.finfo(torch.float32).eps * wanted[kept].abs().max()
