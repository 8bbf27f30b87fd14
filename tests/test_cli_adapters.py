"""`planish export --adapter`: PEFT folders merged before the recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import captured
import peft
import torch
from planish import cli
from planish.ir.program_folder import save_program
from planish.ir.read_safetensors import read_safetensors
from typer.testing import CliRunner


def _call(*arguments: object) -> tuple[int, str]:
    ended = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return ended.exit_code, ended.output


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = copy.deepcopy(captured.sample("llama", "eager").model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["up_proj"]))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def test_a_folder_is_merged_and_told(tmp_path: Path) -> None:
    save_program(captured.captured("llama", "eager"), tmp_path / "base")
    theirs = _adapter(tmp_path / "style")
    code, told = _call(
        "export",
        tmp_path / "base",
        "--out",
        tmp_path / "out",
        "--recipe",
        "raise",
        "--target",
        "torch",
        "--adapter",
        tmp_path / "style",
        "--json",
        tmp_path / "told.json",
    )
    assert code == 0, told
    steps = json.loads((tmp_path / "told.json").read_text())["history"]
    assert "merge_adapters" in json.dumps(steps)
    name = "model.layers.1.mlp.up_proj.weight"
    found = [
        tensors[key]
        for file in (tmp_path / "out").rglob("*.safetensors")
        for tensors in [read_safetensors(file)]
        for key in tensors
        if key.endswith(name)
    ]
    limit = 4 * torch.finfo(torch.float32).eps * theirs[name].abs().max()
    assert found and (found[0] - theirs[name]).abs().max() <= limit


def test_the_plan_names_the_merge_and_writes_nothing(tmp_path: Path) -> None:
    save_program(captured.captured("llama", "eager"), tmp_path / "base")
    _adapter(tmp_path / "style")
    arguments = ("export", tmp_path / "base", "--dry-run", "--adapter", f"{tmp_path / 'style'}=0.5")
    code, told = _call(*arguments)
    assert code == 0 and "merge_adapters" in told


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    save_program(captured.captured("llama", "eager"), tmp_path / "base")
    out = tmp_path / "out"
    code, told = _call("export", tmp_path / "base", "--out", out, "--adapter", tmp_path / "no")
    assert code != 0 and "there is nothing at" in told
    assert not out.exists()
