"""Lottery tickets: the masks of a trained, pruned network on its first weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planish.ir.capture import capture_module
from planish.ir.errors import PickleRefused, SourceNotFound, WrongOption
from planish.ir.program import Program
from planish.ir.read_safetensors import read_safetensors
from planish.ir.text import program_text
from planish.ir.write_safetensors import planned, write_safetensors
from planish.passes.apply_masks import ApplyMasks, WrongMasks
from planish.passes.pipeline import Pipeline
from planish.passes.prune_magnitude import PruneMagnitude
from planish.passes.save_masks import NothingPruned, SaveMasks
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(9, 20), nn.Linear(20, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def program(net: nn.Module) -> Program:
    return capture_module(net.eval(), (torch.ones(3, 9),))


def trained(net: nn.Module, steps: int = 60) -> nn.Module:
    """Some steps towards the sign of a feature."""
    x = torch.randn(64, 9, generator=torch.Generator().manual_seed(5))
    goal = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), goal).backward()
        optimizer.step()
    return net.requires_grad_(False)


def test_a_ticket_is_the_first_weights_where_the_trained_ones_stay(tmp_path: Path) -> None:
    first = program(Net(3).requires_grad_(False))
    file = tmp_path / "masks.safetensors"
    steps = [PruneMagnitude(sparsity="70%"), SaveMasks(path=str(file))]
    pruned = Pipeline(steps, verify="numbers").run(program(trained(Net(3))))
    masks = read_safetensors(file)
    assert masks.keys() == {"up.weight", "down.weight"}
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    ticket = Pipeline([ApplyMasks(path=str(file))], verify="numbers").run(first)
    assert program_text(ticket) == program_text(first)
    for name in masks:
        assert torch.equal(ticket.weights[name] != 0, pruned.weights[name] != 0)
        kept = pruned.weights[name] != 0
        assert torch.equal(ticket.weights[name][kept], first.weights[name][kept])
        assert not torch.equal(ticket.weights[name][kept], pruned.weights[name][kept])
    assert torch.equal(ticket.weights["up.bias"], first.weights["up.bias"])
    notes = {a.before: a.note for a in ticket.history.records[-1].applied}
    assert notes["up.weight"] == "70.0% zeros by its mask"
    assert [f.name for f in tmp_path.iterdir()] == ["masks.safetensors"]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    pruned = Pipeline([PruneMagnitude()]).run(program(Net(1)))
    file = tmp_path / "m.safetensors"
    saved = Pipeline([SaveMasks(path=str(file))], verify="numbers").run(pruned)
    assert all(saved.weights.entry(n) is pruned.weights.entry(n) for n in pruned.weights)
    file.write_bytes(b"old")
    Pipeline([SaveMasks(path=str(file))]).run(pruned)
    assert read_safetensors(file).keys() == {"up.weight", "down.weight"}


def test_weights_that_are_not_pruned_get_no_mask(tmp_path: Path) -> None:
    pruned = Pipeline([PruneMagnitude(skip="down.weight")]).run(program(Net(1)))
    file = tmp_path / "m.safetensors"
    record = Pipeline([SaveMasks(path=str(file))]).run(pruned).history.records[-1]
    assert [d.reason for d in record.declined] == ["less than 1% of it is zero"]
    assert read_safetensors(file).keys() == {"up.weight"}
    with pytest.raises(NothingPruned, match="prune first"):
        Pipeline([SaveMasks(path=str(file))]).run(program(Net(1)))


def test_masks_of_another_network_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    masks = {
        "up.weigth": torch.ones(20, 9, dtype=torch.bool),
        "down.weight": torch.ones(3, 20, dtype=torch.bool),
        "up.bias": torch.ones(20),
        **{f"layers.{n}": torch.ones(1, dtype=torch.bool) for n in range(12)},
    }
    write_safetensors(file, {name: planned(mask) for name, mask in masks.items()})
    with pytest.raises(WrongMasks, match="15 of 15 masks do not fit") as caught:
        Pipeline([ApplyMasks(path=str(file))]).run(program(Net(1)))
    text = str(caught.value)
    assert "and 5 more" in text
    write_safetensors(file, {name: planned(masks[name]) for name in list(masks)[:3]})
    with pytest.raises(WrongMasks) as caught:
        Pipeline([ApplyMasks(path=str(file))]).run(program(Net(1)))
    text = str(caught.value)
    assert "up.weigth: no weight has this name (near: up.weight)" in text
    assert "down.weight: its mask is [3, 20], the weight [2, 20]" in text
    assert "up.bias: its mask is float32, not bool" in text


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="needs the file"):
        Pipeline([ApplyMasks()]).run(program(Net(1)))
    with pytest.raises(WrongOption, match="path is empty"):
        SaveMasks(path="")
    with pytest.raises(SourceNotFound):
        Pipeline([ApplyMasks(path=str(tmp_path / "none.safetensors"))]).run(program(Net(1)))
    pickled = tmp_path / "masks.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(PickleRefused):
        Pipeline([ApplyMasks(path=str(pickled))]).run(program(Net(1)))
    empty = tmp_path / "empty.safetensors"
    write_safetensors(empty, {})
    with pytest.raises(WrongMasks, match="holds no masks"):
        Pipeline([ApplyMasks(path=str(empty))]).run(program(Net(1)))
