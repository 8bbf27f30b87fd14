"""Offsite-tuning: tune a model's outer layers on a stand-in for it, then plug them back.

`offsite_cut{adapters=k, emulator=m}`. Before: layers 1 to n. After: the first k, m of the middle
ones, evenly spaced, and the last k; embeddings, final norm and head as they were. The first and
last k layers are the adapter that is tuned, the thinned middle is the emulator (Xiao et al. 2023,
"Offsite-Tuning", sec. 3.2). `plug_adapters{tuned=PATH}` puts the tuned layers' weights into the
whole program; everything keeps the model's own names, so that layers find their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import PlanishError, WrongOption
from ..ir.program import Node, Program
from ..ir.program_folder import is_program_folder, load_program
from ..ir.read_safetensors import read_safetensors
from ..ir.weight_expressions import constant_nodes
from .contract import Context, Pass, contract
from .keep_layers import CannotCutLayers, layer_ends

_ATTENTION = torch.ops.planish.attention.default
_METADATA = "offsite"
_MOST_TOLD = 10


class CannotPlug(PlanishError):
    """Tuned layers that are not those of the program."""


@dataclass(frozen=True)
class OffsiteCut(Pass):
    """Keep `adapters` layers at each end and `emulator` of those between them."""

    adapters: int = 2
    emulator: int = 4

    contract = contract("lossy", requires=["raised"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        if "cached" in program.facts:
            raise CannotCutLayers(
                "the program has a KV cache already, with an entry for each layer",
                expected="offsite_cut before insert_kv_cache",
                fix="cut the program that was captured without a cache",
            )
        attentions = [node for node in program.graph.nodes if node.target is _ATTENTION]
        count = len(attentions)
        middle = count - 2 * self.adapters
        if self.adapters < 1 or not 1 <= self.emulator <= middle:
            raise WrongOption(
                f"{count} layers cannot become {self.adapters} + {self.emulator} + {self.adapters}",
                expected=f"adapters from 1 to {max(1, (count - 1) // 2)}, and an emulator from 1 "
                f"to the {max(middle, 0)} layers between them",
                found=f"adapters={self.adapters}, emulator={self.emulator}",
                fix="keep fewer layers at the ends, or choose another emulator",
            )
        ends = layer_ends(program, attentions)
        kept = kept_layers(count, self.adapters, self.emulator)
        tuned = [*range(self.adapters), *range(count - self.adapters, count)]
        names = sorted({name for layer in tuned for name in layer_weights(program, ends, layer)})
        if not context.journal.offers():
            return
        current = ends[0]
        for layer, end in enumerate(ends[1:]):
            if layer in kept:
                current = end
            else:
                end.replace_all_uses_with(current)
        Editor(program).sweep()
        program.metadata[_METADATA] = {"layers": count, "kept": kept, "weights": names}
        context.journal.noted(self.pass_name(), current, f"{len(kept)} of {count} layers")


def kept_layers(count: int, adapters: int, emulator: int) -> list[int]:
    """The layers that stay: both ends, and of the middle as many, evenly spaced (its ends too)."""
    middle = range(adapters, count - adapters)
    if emulator == 1:
        chosen = [middle[len(middle) // 2]]
    else:
        step = (len(middle) - 1) / (emulator - 1)
        chosen = [middle[round(place * step)] for place in range(emulator)]
    return [*range(adapters), *chosen, *range(count - adapters, count)]


def layer_weights(program: Program, ends: Sequence[Node], layer: int) -> list[str]:
    """Names of the floating-point weights that are read on the way through this layer alone.

    What other layers read too (tables of angles, a shared bias) stays with the emulator.
    """
    through = {ends[layer]}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(read in through for read in node.all_input_nodes):
            through.add(node)
        if node is ends[layer + 1]:
            break
    through.discard(ends[layer])
    constant = constant_nodes(program)
    weights = [n for n in program.weight_nodes() if n.meta["val"].is_floating_point()]
    return sorted(str(n.target) for n in weights if _read_in(n, through, constant))


def _read_in(weight: Node, through: set[Node], constant: set[Node]) -> bool:
    """Whether a weight, or what is computed from weights, is read here and nowhere else."""
    waiting, seen, found = [weight], {weight}, False
    while waiting:
        for user in waiting.pop().users:
            if user in through:
                found = True
            elif user not in constant:
                return False
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return found


@dataclass(frozen=True)
class PlugAdapters(Pass):
    """Put tuned layers into the whole program: a saved program of offsite_cut, or safetensors."""

    tuned: str = ""

    contract = contract("lossy", requires=["dense_weights"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        if not self.tuned:
            raise WrongOption(
                "plug_adapters was given no tuned layers",
                expected="tuned=FOLDER or tuned=FILE.safetensors",
                fix="name what offsite_cut left, tuned and saved",
            )
        tensors = _tuned(Path(self.tuned))
        _check(program, tensors)
        for done, (name, tensor) in enumerate(sorted(tensors.items())):
            context.progress(done, len(tensors), self.pass_name())
            if context.journal.offers():
                dtype = program.weights.dtype(name)
                program.weights[name] = tensor.to(dtype).contiguous()
                context.journal.changed_weight(self.pass_name(), name, "tuned")


def _tuned(path: Path) -> dict[str, Tensor]:
    """The weights of the tuned layers by name; raises CannotPlug."""
    if not is_program_folder(path):
        return dict(read_safetensors(path))
    saved = load_program(path)
    told: Any = saved.metadata.get(_METADATA)
    if not isinstance(told, dict):
        raise CannotPlug(
            f"{path.name} is a program without layers to plug in",
            expected="a program that offsite_cut made",
            fix="give a safetensors file with the tuned weights, or the cut program",
        )
    return {name: saved.weights[name] for name in told["weights"]}


def _check(program: Program, tensors: Mapping[str, Tensor]) -> None:
    wrong: list[str] = []
    for name, tensor in sorted(tensors.items()):
        if name not in program.weights:
            wrong.append(f"{name} is no weight of this program")
        elif program.weights.shape(name) != tensor.shape:
            own = list(program.weights.shape(name))
            wrong.append(f"{name} is {list(tensor.shape)}, the program's {own}")
    if wrong or not tensors:
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise CannotPlug(
            "the tuned layers belong to another program",
            expected="weights with the names and shapes of this program",
            found="; ".join(wrong[:_MOST_TOLD]) + more or "no weights",
            fix="plug them into the program that was cut",
        )
