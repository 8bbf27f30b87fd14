"""Make LayerNorms RMS norms: take the mean of the residual stream out where it is written.

Before: `%h2 = %h + linear(%a, %O); %x = layer_norm(%h2, %g, %b)`. After: the same with the mean
over the output channels subtracted from `%O`, its bias and the tables, and
`%x = rms_norm(%h2, %g) + %b`. Equal because a LayerNorm subtracts the mean anyway, a sum of values
without mean has none, and the variance of what has no mean is its mean square. A head that is tied
to the table gets a weight of its own first.
Ashkboos et al. 2024 (SliceGPT), sec. 3.2. RMS norms let the stream be rotated (see `rotate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.edit import Editor
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, Program
from ..ir.residual_stream import Stream, residual_streams
from ..ir.rewrite import Journal
from ..ir.weight_roles import weight_roles
from .contract import Context, Pass, contract
from .fold_norms import untie_heads


@dataclass(frozen=True)
class CenterNorms(Pass):
    """Turn the LayerNorms of a residual stream into RMS norms (BOUNDED)."""

    contract = contract("bounded", requires=["raised", "dense_weights"], rounds_weights=True)

    def run(self, program: Program, context: Context) -> None:
        for stream in residual_streams(program):
            if stream.means:
                reason = why_not_centered(stream)
                if reason:
                    context.journal.declined(self.pass_name(), stream.means[0], reason)
                center_stream(program, stream, context.journal, self.pass_name())


def why_not_centered(stream: Stream) -> str:
    """The sentence why the stream keeps its mean, or ""."""
    if stream.norms:
        return f"rms_norm %{stream.norms[0].name} reads the same stream, with its mean"
    odd = [
        n for n in stream.means if list(bound_arguments(n)["normalized_shape"]) != [stream.channels]
    ]
    if odd:
        return f"%{odd[0].name} normalizes more than the channels of the stream"
    return next(iter((*stream.objections, *stream.bare)), "")


def center_stream(
    program: Program, stream: Stream, journal: Journal, rule: str, final: bool = True
) -> Stream:
    """Center what writes into the stream and replace its LayerNorms; returns it as it is then.

    final: the norms' values stay as they are after this, so they may be compared.
    """
    if not stream.means or why_not_centered(stream):
        return stream
    tied = {role.name for role in weight_roles(program) if role.tables and role.matmuls}
    tied &= {name for name, _ in stream.writers}
    untie_heads(program, journal, rule, tied)
    still = {role.name for role in weight_roles(program) if role.tables and role.matmuls}
    if still & tied or not journal.offers():
        return stream
    for name, axis in stream.writers:
        wide = program.weights[name].double()
        centered = wide - wide.mean(axis, keepdim=True)
        program.weights[name] = centered.to(program.weights.dtype(name))
        journal.changed_weight(rule, name, "its mean over the stream's channels is 0")
    editor = Editor(program)
    for node in stream.means:
        if journal.offers():
            new = _as_rms(editor, node)
            editor.replace(node, new)
            if final:
                journal.replaced(rule, node, new)
            else:
                journal.noted(rule, new, "was a LayerNorm")
    editor.sweep()
    first = stream.writers[0]
    return next((s for s in residual_streams(program) if first in s.writers), stream)


def _as_rms(editor: Editor, node: Node) -> Node:
    given = bound_arguments(node)
    with editor.at(node):
        new = op.rms_norm(given["input"], given["weight"], given["eps"])
        return new if given["bias"] is None else op.add(new, given["bias"])


__all__ = ["CenterNorms", "center_stream", "why_not_centered"]
