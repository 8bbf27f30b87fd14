"""KV caches written from their papers in plain PyTorch, inside the models' own attention.

A model of transformers is run on the new tokens of each call alone; its attention hands queries,
keys and values to a `PaperCache`, which keeps what its paper says and attends as it says. Nothing
of planish is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface


@dataclass
class PaperCache:
    """The base: keeps everything. Per layer: what was kept, in a dict of the subclass's own."""

    layers: dict[int, dict[str, Any]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        kept = self.layers.setdefault(layer, {})
        kept["k"] = joined(kept.get("k"), k)
        kept["v"] = joined(kept.get("v"), v)
        return weights(q, kept["k"], **options) @ repeated(kept["v"], q)


_CURRENT: ContextVar[PaperCache] = ContextVar("paper_cache")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    options = {"scale": scaling, "softcap": softcap or 0.0, "window": sliding_window or 0}
    out = _CURRENT.get().attend(module.layer_idx, query, key, value, **options)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


AttentionInterface.register("paper", _forward)


def run_pieces(
    model: nn.Module,
    cache: PaperCache,
    ids: Tensor,
    cuts: Sequence[int],
    places: str = "text",
) -> Tensor:
    """Logits of a text given in pieces ending at `cuts`.

    places: position ids are those of the text; "cache": counted from the cache's length on (the
    cache must tell it as `kept_tokens`); "none": all 0, so that a rotary embedding turns nothing.
    """
    model.set_attn_implementation("paper")  # type: ignore[operator]
    token = _CURRENT.set(cache)
    found: list[Tensor] = []
    start = 0
    try:
        with torch.no_grad():
            for end in cuts:
                first = {"text": start, "none": 0}.get(places)
                first = cache.kept_tokens if first is None else first  # type: ignore[attr-defined]
                position = first + torch.arange(end - start) * (places != "none")
                made = model(input_ids=ids[:, start:end], position_ids=position[None])
                found.append(made.logits)
                start = end
    finally:
        _CURRENT.reset(token)
    return torch.cat(found, 1)


def joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], 2)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Key heads repeated to the number of query heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def weights(q: Tensor, k: Tensor, scale: float, softcap: float = 0.0, window: int = 0) -> Tensor:
    """Softmax weights [batch, heads, queries, keys]; the last query stands at the last key."""
    scores = q @ repeated(k, q).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = q.shape[2], k.shape[2]
    for i in range(queries):
        for j in range(keys):
            behind = i + keys - queries - j
            if behind < 0 or (window and behind >= window):
                scores[:, :, i, j] = -math.inf
    return torch.softmax(scores, -1)


class Int8Cache(PaperCache):
    """Each token of each head is rounded to 255 levels between -max|x| and max|x|."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().attend(layer, q, self.rounded(k), self.rounded(v), **options)

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
            row = x[tuple(place)]
            step = row.abs().max() / 127
            out[tuple(place)] = torch.round(row / step) * step
        return out


@dataclass
class KiviCache(PaperCache):
    """Liu et al. 2024: bits B, group size G, residual length R; see section 3 of the paper."""

    bits: int = 4
    group: int = 4
    residual: int = 8

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        kept = self.layers.setdefault(layer, {"kg": [], "vg": []})
        recent_k, recent_v = joined(kept.get("kr"), k), joined(kept.get("vr"), v)
        all_k = torch.cat([*kept["kg"], recent_k], 2)
        all_v = torch.cat([*kept["vg"], recent_v], 2)
        out = weights(q, all_k, **options) @ repeated(all_v, q)
        while recent_k.shape[2] >= self.residual:
            run, recent_k = recent_k[:, :, : self.residual], recent_k[:, :, self.residual :]
            kept["kg"] += [self.key_group(g) for g in run.split(self.group, 2)]
        while recent_v.shape[2] > self.residual:
            kept["vg"].append(self.value_token(recent_v[:, :, :1]))
            recent_v = recent_v[:, :, 1:]
        kept["kr"], kept["vr"] = recent_k, recent_v
        return out

    def key_group(self, x: Tensor) -> Tensor:
        """G tokens: every channel on its own grid."""
        return torch.stack([self.on_grid(c) for c in x.unbind(3)], 3)

    def value_token(self, x: Tensor) -> Tensor:
        """One token: every G channels on their own grid."""
        size = min(self.group, x.shape[3])
        return torch.cat([self.on_grid(g) for g in x.split(size, 3)], 3)

    def on_grid(self, x: Tensor) -> Tensor:
        """Each batch row and head of x: zero point min, scale (max - min) / (2^B - 1)."""
        flat = x.flatten(2)
        low, high = flat.min(2).values[..., None], flat.max(2).values[..., None]
        scale = (high - low) / (2**self.bits - 1)
        codes = torch.where(scale > 0, torch.round((flat - low) / scale), torch.zeros_like(flat))
        return (codes * scale + low).reshape(x.shape)


@dataclass
class StreamCache(PaperCache):
    """Xiao et al. 2023: keys are kept unrotated and turned by their place in the cache."""

    sinks: int = 4
    window: int = 8
    frequencies: Tensor | None = None

    @property
    def kept_tokens(self) -> int:
        return self.layers[0]["k"].shape[2] if self.layers else 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        kept = self.layers.setdefault(layer, {})
        keys, values = joined(kept.get("k"), k), joined(kept.get("v"), v)
        first = keys.shape[2] - q.shape[2]
        turned = weights(self.turned(q, first), self.turned(keys, 0), **options)
        if keys.shape[2] > self.sinks + self.window:
            stay = [*range(self.sinks), *range(keys.shape[2] - self.window, keys.shape[2])]
            kept["k"], kept["v"] = keys[:, :, stay], values[:, :, stay]
        else:
            kept["k"], kept["v"] = keys, values
        return turned @ repeated(values, q)

    def turned(self, x: Tensor, first: int) -> Tensor:
        """Rotary embedding of the places first, first + 1, ... in pairs (i, i + half)."""
        if self.frequencies is None:
            return x
        angle = (first + torch.arange(x.shape[2]))[:, None] * self.frequencies
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class HeavyHitterCache(PaperCache):
    """Zhang et al. 2023, algorithm 1, for every row of the batch and key head on its own.

    After each query the score of every token it saw grows by its attention; when there are more
    than heavy + recent tokens, the one of least score that is not among the last `recent` goes.
    Of a prompt all queries are scored before tokens go, one by one.
    """

    heavy: int = 3
    recent: int = 4
    evicted: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        heads = self.layers.setdefault(layer, {})
        group = q.shape[1] // k.shape[1]
        out = torch.empty(*q.shape[:3], v.shape[3])
        for row in range(q.shape[0]):
            for head in range(k.shape[1]):
                kept = heads.setdefault((row, head), {"k": [], "v": [], "score": []})
                kept["k"] += list(k[row, head])
                kept["v"] += list(v[row, head])
                kept["score"] += [0.0] * k.shape[2]
                mine = slice(head * group, (head + 1) * group)
                keys, values = torch.stack(kept["k"])[None, None], torch.stack(kept["v"])
                paid = weights(q[row : row + 1, mine], keys, **options)[0]
                out[row, mine] = paid @ values
                total = paid.sum((0, 1)).tolist()
                kept["score"] = [s + t for s, t in zip(kept["score"], total, strict=True)]
                self.evict(kept)
        return out

    def evict(self, kept: dict[str, list[Any]]) -> None:
        while len(kept["score"]) > self.heavy + self.recent:
            older = kept["score"][: len(kept["score"]) - self.recent]
            least = older.index(min(older))
            self.evicted += 1
            for entries in kept.values():
                del entries[least]
