"""What the tensors that an adapter holds for a module change: one method a kind of adapter.

Names are the folder's own. They meet the program's weights by name, where the program may lack a
prefix that the adapter has, or the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .adapter_change import Added, Change, ReplaceRows, Spot
from .adapter_lora import AdaptiveRank, Dora, Entrywise, ExpertLowRank, LowRank, Subtracted
from .adapter_products import Hadamard, Kronecker, Scaled, VectorProduct, random_projections
from .adapter_rotation import Rotated
from .adapter_step import Step
from .program import Program
from .read_adapter import Adapter
from .weight_roles import weight_roles

PREFIX = re.compile(r"^base_model\.(model\.)?")
"""What PEFT puts before the names of the base."""


@dataclass
class ModuleChanges:
    """The changes of one adapter as they are found, and what is wrong with it.

    inner: modules that were wrapped within a wrapped one.
    """

    adapter: Adapter
    program: Program
    steps: list[Step] = field(default_factory=list[Step])
    wrong: list[str] = field(default_factory=list[str])
    inner: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        weights = self.program.weights
        self.names = [*weights, *weights.aliases]
        self.roles = {role.name: role for role in weight_roles(self.program)}

    # names

    def find(self, name: str) -> str | None:
        """The program's name of an adapter's weight: the same, or one that ends alike."""
        if name in self.names:
            return name
        ends = [n for n in self.names if n.endswith("." + name) or name.endswith("." + n)]
        return ends[0] if len(ends) == 1 else None

    def spot(self, name: str) -> Spot:
        """The weight as its readers see it, of a tied one those that go by this name."""
        kept = self.program.weights.canonical(name)
        shape = tuple(int(size) for size in self.program.weights.shape(kept))
        role = self.roles.get(kept)
        if role is None:
            return Spot(name, shape)
        module = name.rpartition(".")[0]
        readers = [*role.matmuls, *role.tables]
        own = {reader for reader in readers if reader.meta.get("module") == module}
        own = own or set(readers)
        axis = role.axis if own & set(role.matmuls) else None
        return Spot(name, shape, axis, bool(own & set(role.tables)))

    def add(self, name: str, change: Change, module: str) -> None:
        found = self.find(name)
        if found is None:
            self.wrong.append(f"{module}: the base has no weight {name}")
            return
        spot = self.spot(found)
        reason = change.misfit(spot)
        if reason:
            self.wrong.append(f"{module}: {reason} ({spot.name})")
        else:
            self.steps.append(Step(spot, change, module))

    # what modules hold

    def module(self, module: str, parts: dict[str, Tensor]) -> None:
        first = min(parts)
        made = {
            "lora": self._lora,
            "hada": self._product(Hadamard, "hada_"),
            "lokr": self._product(Kronecker, "lokr_"),
            "ia3": self._scaled,
            "vera": self._vera,
            "hira": self._entrywise,
            "oft": self._rotated,
            "beft": self._bias,
        }
        if "trainable_tokens_delta" in first:
            self._tokens(module, parts[first])
        else:
            made[first.partition("_")[0]](module, parts)

    def _lora(self, module: str, parts: dict[str, Tensor]) -> None:
        if self.adapter.kind == "ADALORA":
            self._adaptive(module, parts)
            return
        scale = self.adapter.scale(module)
        table = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        names = [f"lora_embedding_{x}" if table else f"lora_{x}.weight" for x in "AB"]
        missing = [name for name in names if name not in parts]
        if missing:
            self.wrong.append(f"{module}: the adapter lacks {', '.join(missing)}")
            return
        a, b = (parts[name] for name in names)
        if a.shape[0] == b.shape[1] and self._rank_differs(module, int(a.shape[0])):
            return
        flipped = bool(self.adapter.setting("fan_in_fan_out")) or table
        branch = LowRank(a, b, scale, flipped)
        change: Change = branch
        magnitude = parts.get("lora_magnitude_vector", parts.get("lora_magnitude_vector.weight"))
        init = str(self.adapter.setting("init_lora_weights", True)).lower()
        if magnitude is not None:
            change = Dora(branch, magnitude)
        elif init in ("pissa", "olora"):
            change = Subtracted(branch, init)
        packed = self._packed_attention(module)
        self.add(f"{module}.in_proj_weight" if packed else f"{module}.weight", change, module)
        if module in self.inner and self._packed_attention(module.rpartition(".")[0]):
            # PEFT adds the branch of such an output twice, in training too.
            self.add(f"{module}.weight", change, module)
        if "lora_B.bias" in parts and not packed:
            self.add(f"{module}.bias", Added(parts["lora_B.bias"], scale), module)

    def _packed_attention(self, module: str) -> bool:
        """Whether a module keeps its three projections in one weight (nn.MultiheadAttention)."""
        return bool(module) and self.find(f"{module}.in_proj_weight") is not None

    def _adaptive(self, module: str, parts: dict[str, Tensor]) -> None:
        names = ("lora_A", "lora_B", "lora_E")
        if missing := [name for name in names if name not in parts]:
            self.wrong.append(f"{module}: the adapter lacks {', '.join(missing)}")
            return
        a, b, values = (parts[name] for name in names)
        if not self._rank_differs(module, int(a.shape[0])):
            alpha, initial = self.adapter.setting("lora_alpha"), self.adapter.setting("init_r")
            scale = float(alpha if alpha > 0 else a.shape[0])
            flipped = bool(self.adapter.setting("fan_in_fan_out"))
            change = AdaptiveRank(a, b, values, scale, float(initial), flipped)
            self.add(f"{module}.weight", change, module)

    def _rank_differs(self, module: str, found: int) -> bool:
        """A configuration of another rank would give the delta another scale."""
        rank = self.adapter.rank(module)
        if rank != found:
            self.wrong.append(f"{module}: rank {rank} in the configuration, {found} in the tensors")
        return rank != found

    def _product(
        self, kind: Callable[[Mapping[str, Tensor], float], Change], prefix: str
    ) -> Callable[[str, dict[str, Tensor]], None]:
        def build(module: str, parts: dict[str, Tensor]) -> None:
            stripped = {name.removeprefix(prefix): value for name, value in parts.items()}
            self.add(f"{module}.weight", kind(stripped, self.adapter.scale(module)), module)

        return build

    def _scaled(self, module: str, parts: dict[str, Tensor]) -> None:
        inputs = parts["ia3_l"].shape[0] == 1  # [1, in], or [out, 1]
        flipped = bool(self.adapter.setting("fan_in_fan_out"))
        self.add(f"{module}.weight", Scaled(parts["ia3_l"].flatten(), inputs, flipped), module)
        if not inputs and self.find(f"{module}.bias") is not None:
            self.add(f"{module}.bias", Scaled(parts["ia3_l"].flatten(), False), module)

    def _vera(self, module: str, parts: dict[str, Tensor]) -> None:
        a, b = self._projections
        d, out = parts["vera_lambda_d"], parts["vera_lambda_b"]
        flipped = bool(self.adapter.setting("fan_in_fan_out"))
        self.add(f"{module}.weight", VectorProduct(a, b, d, out, flipped=flipped), module)

    def _entrywise(self, module: str, parts: dict[str, Tensor]) -> None:
        table = "hira_embedding_A" in parts or "hira_embedding_B" in parts
        names = [f"hira_{'embedding_' * table}{x}" for x in "AB"]
        if missing := [name for name in names if name not in parts]:
            self.wrong.append(f"{module}: the adapter lacks {', '.join(missing)}")
            return
        a, b = (parts[name] for name in names)
        flipped = bool(self.adapter.setting("fan_in_fan_out")) or table
        self.add(f"{module}.weight", Entrywise(LowRank(a, b, 1.0, flipped)), module)

    def _rotated(self, module: str, parts: dict[str, Tensor]) -> None:
        series = bool(self.adapter.setting("use_cayley_neumann"))
        terms = int(self.adapter.setting("num_cayley_neumann_terms")) if series else 0
        shared = bool(self.adapter.setting("block_share"))
        radius = float(self.adapter.setting("eps")) if self.adapter.setting("coft") else 0.0
        change = Rotated(parts["oft_R.weight"], terms, shared, radius)
        self.add(f"{module}.weight", change, module)

    def _bias(self, module: str, parts: dict[str, Tensor]) -> None:
        self.add(f"{module}.bias", Added(parts["beft_bias"].flatten()), module)

    @property
    def _projections(self) -> tuple[Tensor, Tensor]:
        stored = {PREFIX.sub("", name): value for name, value in self.adapter.tensors.items()}
        if "vera_A" in stored and "vera_B" in stored:
            return stored["vera_A"], stored["vera_B"]
        outs: list[int] = []
        ins: list[int] = []
        for name, value in stored.items():
            found = self.find(name.removesuffix(".vera_lambda_b") + ".weight")
            if name.endswith(".vera_lambda_b") and found is not None:
                outs.append(value.numel())
                ins.append(self.program.weights.shape(found).numel() // value.numel())
        out, into = max(outs, default=1), max(ins, default=1)
        key, rank = self.adapter.setting("projection_prng_key"), self.adapter.setting("r")
        return random_projections(int(key), int(rank), out, into)

    def _tokens(self, module: str, value: Tensor) -> None:
        rows = self.adapter.setting("trainable_token_indices")
        rows = rows if rows is not None else self.adapter.setting("token_indices", [])
        if isinstance(rows, Mapping):
            rows = next((v for k, v in rows.items() if module.endswith(k)), [])
        change = ReplaceRows(tuple(int(row) for row in rows), value)
        self.add(f"{module}.weight", change, module)

    def experts(self, module: str, nested: list[dict[str, Tensor]]) -> None:
        """target_parameters: each wrapper round a module holds the factors of one parameter.

        Which parameter is read from the factors' sizes.
        """
        named = [
            name.rpartition(".")[2]
            for name in self.adapter.setting("target_parameters", [])
            if f"{module}.".endswith(name.rpartition(".")[0] + ".")
        ]
        stacks = [place for name in named if (place := self.find(f"{module}.{name}"))]
        for parts in nested:
            a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
            if a is None or b is None:
                self.wrong.append(f"{module}: the adapter lacks a factor of {', '.join(named)}")
                continue
            experts = int(self.program.weights.shape(stacks[0])[0]) if stacks else 1
            if self._rank_differs(module, int(a.shape[0]) // experts):
                continue
            change = ExpertLowRank(a, b, self.adapter.scale(module))
            places = [self.find(f"{module}.{name}") for name in named]
            fits = [
                name
                for name, place in zip(named, places, strict=True)
                if place is not None and change.misfit(self.spot(place)) is None
            ]
            if len(fits) > 1:
                told = " and ".join(fits)
                self.wrong.append(f"{module}: its factors fit {told}, and which is not told")
                continue
            chosen = fits[0] if fits else (named[0] if named else "weight")
            self.add(f"{module}.{chosen}", change, module)
            named = [name for name in named if name != chosen]


__all__ = ["PREFIX", "ModuleChanges"]
