"""Rotate the residual stream and the value heads, so that no channel stands out.

Before: `%h = embedding(%E, ids)`, `%h2 = %h + linear(%a, %O)`, `%y = linear(rms_norm(%h), %W)`.
After: the same graph with `%E R`, `R^T %O` and `%W R` for an orthogonal R; before that the norms'
weights are folded into `%W` and LayerNorms become RMS norms (see `fold_norms`, `center_norms`; a
head that is tied to the table gets a weight of its own). Equal because an RMS norm keeps x R as
long as x, and R R^T = 1. Value heads: the rows of `%V` and the columns of `%O` by a rotation of
each head, whose channels attention weighs alike. Everything is folded into weights.
Ashkboos et al. 2024 (QuaRot), sec. 4, stage 1; R1 and R2 of Liu et al. 2024 (SpinQuant), sec. 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.axes_products import VALUES
from ..ir.errors import WrongOption
from ..ir.hadamard import rotation
from ..ir.program import Program
from ..ir.residual_stream import Stream, norm_weight, residual_streams
from ..ir.rewrite import Journal
from ..ir.rotate_weights import rotate_axis, rotate_heads
from ..ir.scale_edges import ScaleEdge, scale_edges
from .center_norms import center_stream
from .contract import Context, Pass, contract
from .fold_norms import fold_norm, tied_to_norms, untie_heads, why_not_foldable


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate the residual stream and the value heads by orthogonal matrices (BOUNDED).

    residual, heads: which of the two. kind: "hadamard" (with random signs; where none of the size
    is known, times a random rotation) or "random". seed: of signs and random rotations.
    """

    residual: bool = True
    heads: bool = True
    kind: str = "hadamard"
    seed: int = 0

    contract = contract("bounded", requires=["raised", "dense_weights"], rounds_weights=True)

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise WrongOption(
                f"option rotate.kind cannot be {self.kind!r}",
                expected="hadamard or random",
                found=repr(self.kind),
            )

    def run(self, program: Program, context: Context) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        if self.residual:
            self._rotate_streams(program, context, generator)
        if self.heads:
            self._rotate_heads(program, context.journal, generator)

    def _rotate_streams(
        self, program: Program, context: Context, generator: torch.Generator
    ) -> None:
        journal, rule = context.journal, self.pass_name()
        streams = residual_streams(program)
        if not streams:
            journal.declined(rule, program.output, "no residual stream starts at a table")
        for stream in streams:
            stream = center_stream(program, stream, journal, rule, final=False)
            reason = why_not_rotated(program, stream)
            if reason:
                journal.declined(rule, stream.axes[0][0], reason)
                continue
            _fold_norms(program, stream, journal, rule)
            unfolded = [name for name in _norm_names(stream) if not _is_one(program, stream, name)]
            if unfolded:
                journal.declined(rule, stream.axes[0][0], f"{unfolded[0]} was not folded")
            elif journal.offers():
                matrix, what = rotation(stream.channels, generator, self.kind == "random")
                for name, axis in _axes_now(program, stream):
                    context.progress(0, len(stream.axes), name)
                    rotate_axis(program, name, axis, matrix)
                    journal.changed_weight(rule, name, f"residual stream, {what}")

    def _rotate_heads(self, program: Program, journal: Journal, generator: torch.Generator) -> None:
        for edge in scale_edges(program):
            if edge.kind != "v->o" or not edge.free:
                continue
            if edge.heads is None or edge.passed != frozenset({VALUES}):
                why = "its channels do not make whole heads, or are changed one by one"
                journal.declined(self.pass_name(), edge.name, why)
            elif journal.offers():
                width = edge.heads.shape[1]
                matrix, what = rotation(width, generator, self.kind == "random")
                for name in rotate_heads(program, edge, edge.heads, matrix):
                    journal.changed_weight(self.pass_name(), name, f"value heads, {what}")


def why_not_rotated(program: Program, stream: Stream) -> str:
    """The sentence why a stream keeps its basis, or ""."""
    if stream.objections:
        more = len(stream.objections) - 1
        return stream.objections[0] + (f" (and {more} more)" if more else "")
    if stream.means:
        why = f": {stream.bare[0]}" if stream.bare else ""
        return (
            f"{stream.means[0].name} takes the mean of the stream, which cannot be taken out{why}"
        )
    trial = program.copy()
    untie_heads(trial, Journal(trial), "", tied_to_norms(trial))
    edges = {edge.name: edge for edge in scale_edges(trial)}
    for name in _norm_names(stream):
        if not _is_one(program, stream, name):
            if name not in edges:
                return f"the weight {name} is not followed"
            reason = _why_kept(trial, edges[name])
            if reason:
                return reason
    return ""


def _why_kept(program: Program, edge: ScaleEdge) -> str:
    if not edge.consumers:
        return f"{edge.name} does not lead to products alone: {edge.reason}"
    return why_not_foldable(program, edge)


def _fold_norms(program: Program, stream: Stream, journal: Journal, rule: str) -> None:
    names = [name for name in _norm_names(stream) if not _is_one(program, stream, name)]
    if not names:
        return
    untie_heads(program, journal, rule, tied_to_norms(program))
    edges = {edge.name: edge for edge in scale_edges(program)}
    for name in names:
        edge = edges.get(name)
        if edge is not None and not _why_kept(program, edge) and journal.offers():
            fold_norm(program, edge, journal, rule)


def _norm_names(stream: Stream) -> list[str]:
    found = [norm_weight(node) for node in stream.norms]
    return list(dict.fromkeys(name for name, _ in filter(None, found)))


def _is_one(program: Program, stream: Stream, name: str) -> bool:
    offset = next(o for n, o in filter(None, map(norm_weight, stream.norms)) if n == name)
    return bool((program.weights[name].double() + offset == 1).all())


def _axes_now(program: Program, stream: Stream) -> list[tuple[str, int]]:
    """The stream's weight axes after heads were untied."""
    for found in residual_streams(program):
        if stream.axes[0] in found.axes:
            return found.axes
    return stream.axes


__all__ = ["Rotate", "why_not_rotated"]
