"""Adapters on tied tables, against what PEFT makes of the model with the tie undone before.

PEFT's merge into a model whose tables are tied changes both of them by the adapter of one, so it is
no reference; its own advice is to untie first.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import captured
import peft
import planish
import pytest
import torch
from peft_adapters import LORA, trained, weights_gap
from planish.ir.encoded import Encoded
from planish.ir.errors import UnknownOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_adapter import AdapterMismatch
from planish.ir.text import program_text
from planish.passes.merge_adapters import MergeAdapters
from planish.passes.merge_into_codes import MergeIntoCodes
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from torch import nn

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
APART: dict[str, Any] = {
    "the table": lambda: LORA(r=4, target_modules=["embed_tokens"]),
    "the head": lambda: LORA(r=4, target_modules=["lm_head", "q_proj"]),
    "both": lambda: LORA(r=4, target_modules=["embed_tokens", "lm_head"]),
    "a saved table": lambda: LORA(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "a saved head": lambda: LORA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "other tokens of each": lambda: LORA(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5, 1], "lm_head": [3, 2]},
    ),
}
TOGETHER: dict[str, Any] = {
    "lora": lambda: LORA(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved": lambda: LORA(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 1], target_modules=["embed_tokens"]
    ),
    "tokens beside": lambda: LORA(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 1]),
}


def merged(folder: Path, *, untie: bool) -> Program:
    step = MergeAdapters(adapters=str(folder), untie=untie)
    return Pipeline([step]).run(captured.captured("gemma", "eager"))


def as_applied(adapted: Any, program: Program) -> None:
    """The merged program is the model with the adapter beside it, as PEFT runs it."""
    ids = captured.sample("gemma", "eager").other_inputs()["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        own = adapted.eval()(**inputs)["logits"]
        exact = adapted.double()(**inputs)["logits"]
    found = run(program, program.flatten_inputs((), inputs))[0]
    # What is merged is rounded once, what is not at every sum; either may be the better one.
    assert (found - exact).abs().max() <= 4 * (own - exact).abs().max()


@pytest.mark.parametrize("case", APART)
def test_each_name_has_values_of_its_own(case: str, tmp_path: Path) -> None:
    adapted = trained("gemma", APART[case](), tmp_path)
    sample = captured.sample("gemma", "eager")
    program = merged(tmp_path, untie=True)
    assert not program.weights.aliases
    as_applied(adapted, program)
    untied = copy.deepcopy(sample.model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    theirs = peft.PeftModel.from_pretrained(untied, tmp_path).merge_and_unload().state_dict()
    gap = weights_gap(captured.captured("gemma", "eager"), program, theirs)
    assert gap.units <= 4, gap


@pytest.mark.parametrize("case", APART)
def test_without_the_option_they_are_refused(case: str, tmp_path: Path) -> None:
    trained("gemma", APART[case](), tmp_path)
    with pytest.raises(AdapterMismatch, match=r"is tied to .*untie=true"):
        merged(tmp_path, untie=False)


def test_options_of_a_merge_that_is_asked_for_by_folders(tmp_path: Path) -> None:
    """They are checked before it is known which pass merges, and then given to it."""
    trained("gemma", APART["the head"](), tmp_path)
    program = captured.captured("gemma", "eager")
    untie: dict[str, Any] = {"merge_adapters.untie": True}
    made = planish.optimize(program, recipe="raise", adapters=[tmp_path], options=untie)
    assert HEAD in made.program.weights and not made.program.weights.aliases
    for wrong in ("merge_adapters.bogus", "merge_into_codes.bogus", "quantize_weights.bits"):
        with pytest.raises(UnknownOption):
            planish.optimize(program, adapters=[tmp_path], options={wrong: 4})


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("untie", [False, True])
def test_what_keeps_the_tie_changes_the_one_weight(case: str, untie: bool, tmp_path: Path) -> None:
    adapted = trained("gemma", TOGETHER[case](), tmp_path)
    program = merged(tmp_path, untie=untie)
    assert program.weights.aliases == {HEAD: TABLE}
    as_applied(adapted, program)


def test_a_promise_that_is_not_kept_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained("gemma", TOGETHER["lora"](), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lm_head.lora_A" in key)
    save_file(tensors | {name: tensors[name] + 1}, file)
    with pytest.raises(AdapterMismatch, match="says that they are one"):
        merged(tmp_path, untie=True)


def test_one_adapter_keeps_the_tie_and_another_ends_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trained("gemma", TOGETHER["tokens"](), first)
    trained("gemma", APART["a saved head"](), second)
    base = captured.captured("gemma", "eager")
    step = MergeAdapters(adapters=f"{first}; {second}", untie=True)
    both = Pipeline([step]).run(base)
    assert torch.equal(both.weights[TABLE], merged(first, untie=False).weights[TABLE])
    assert torch.equal(both.weights[HEAD], merged(second, untie=True).weights[HEAD])
    assert not torch.equal(both.weights[TABLE], base.weights[TABLE])


def test_golden_text(tmp_path: Path) -> None:
    trained("gemma", APART["the head"](), tmp_path)
    before, after = captured.captured("gemma", "eager"), merged(tmp_path, untie=True)
    changed = [
        (old, new)
        for old, new in zip(
            program_text(before).splitlines(), program_text(after).splitlines(), strict=True
        )
        if old != new
    ]
    ((old, new),) = changed
    assert f"%{TABLE})" in old and new == old.replace(TABLE, HEAD)
    notes = [a.note for a in after.history.records[-1].applied if a.after == HEAD]
    assert notes == ["no longer tied to " + TABLE, "Replace, LowRank"]


def test_readers_that_no_name_tells_apart(tmp_path: Path) -> None:
    trained("gemma", APART["the head"](), tmp_path)
    base = captured.captured("gemma", "eager")
    reader = next(n for n in base.graph.nodes if n.meta.get("module") == "lm_head")
    reader.meta["module"] = ""
    with pytest.raises(AdapterMismatch, match="of no module reads it under no name of its own"):
        Pipeline([MergeAdapters(adapters=str(tmp_path), untie=True)]).run(base)


def test_a_table_in_codes(tmp_path: Path) -> None:
    """Merged through the codes of the name that changes; the other keeps its own."""
    trained("gemma", APART["the head"](), tmp_path)
    step = QuantizeWeights(bits=8, remainder="short", embeddings="int8-g16-sym")
    base = Pipeline([step]).run(captured.captured("gemma", "eager"))
    made = Pipeline([MergeIntoCodes(adapters=str(tmp_path), untie=True)]).run(base)
    dense = merged(tmp_path, untie=True)
    table, head = made.weights.entry(TABLE), made.weights.entry(HEAD)
    assert isinstance(table, Encoded) and isinstance(head, Encoded)
    assert table is base.weights.entry(TABLE) and head.format == table.format
    # rounded once more, of a weight that differs by the base's rounding: each within a step
    error = (made.weights[HEAD] - dense.weights[HEAD]).abs().double()
    allowed = head.worst_error() + table.worst_error()
    assert bool((error <= allowed * (1 + 2**-20)).all())
