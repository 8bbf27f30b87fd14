"""The ONNX target: a program becomes `model.onnx` with its weights in `model.onnx.data`.

Every operation is translated by our own tables (`onnx_table`), so the ONNX graph is the program's
graph: an operation a node or a few, under the program's names, with the source module in the
node's metadata. Weights stay as they are kept: dense, or packed integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as oir

from ..ir.errors import WrongOption
from ..ir.program import Program
from ..ir.text import value_names
from ..passes.keep_last_logits import KeepLastLogits
from ..passes.pipeline import Pipeline
from .onnx_builder import CONTRIB, Builder, Options
from .onnx_decoder import manifest_section
from .onnx_interface import graph_inputs, graph_outputs
from .onnx_lower import Lowered, lower
from .onnx_translate import translate_program
from .target import Target

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
OPSET = 23
IR_VERSION = 11
LAST = 32
"""Positions whose logits `logits="last"` keeps: a row costs little, and drafts fit in."""


def export(
    program: Program,
    folder: Path,
    profile: str,
    metadata: Mapping[str, Any],
    *,
    activations: str = "float",
    logits: str = "all",
    attention: str = "onnx",
) -> dict[str, Any]:
    """Write `model.onnx` and `model.onnx.data` into an existing folder.

    profile: "ort" may use onnxruntime's own operators, "standard" only those of ONNX. activations:
    "float" computes what the program computes; "int8" lets onnxruntime round the activations of
    packed linears to 8 bits, which is faster and a loss on top of the weights' own. logits: "all",
    or "last" for those of the last LAST positions, all that generating reads. attention: "onnx", or
    "mha" for onnxruntime's MultiHeadAttention where it can say what is meant, for those of its
    providers that know only that one (on a CPU it is no faster). metadata: told
    in the model's properties. Returns the manifest's section "decoder" for a program with a KV
    cache. Raises UnsupportedByTarget, WrongOption.
    """
    if activations == "int8" and profile != "ort":
        raise WrongOption(
            "only profile ort has products of 8 bit activations",
            expected='activations="float", or profile="ort"',
            found=f'activations="int8" with profile={profile!r}',
            fix="leave activations out",
        )
    options = Options(profile, activations, attention)
    if logits == "last":
        program = Pipeline([KeepLastLogits(LAST)], on_break="raise").run(program)
    lowered = lower(program, options)
    oir.save(_written(lowered, options, metadata), folder / MODEL, external_data=WEIGHTS)
    if lowered.decoder is None:
        return {}
    return {"decoder": manifest_section(lowered.program, lowered.decoder)}


def build(program: Program, options: Options, metadata: Mapping[str, Any]) -> oir.Model:
    """The model in memory; its weights are read only when it is saved."""
    return _written(lower(program, options), options, metadata)


def _written(lowered: Lowered, options: Options, metadata: Mapping[str, Any]) -> oir.Model:
    program, decoder = lowered.program, lowered.decoder
    names = value_names(program.graph) | (decoder.inputs if decoder else {})
    b = Builder(program, options, names, notes=lowered.notes)
    inputs = graph_inputs(b, decoder)
    translate_program(b, program.results)
    outputs = graph_outputs(b, inputs, decoder)
    graph = oir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=list(b.initializers.values()),
        opset_imports=_opsets(b),
        name=str(program.metadata.get("source", "program")),
    )
    properties = _properties(b, metadata)
    return oir.Model(
        graph, ir_version=IR_VERSION, producer_name="planish", metadata_props=properties
    )


def _opsets(b: Builder) -> dict[str, int]:
    opsets = {"": OPSET}
    if any(node.domain == CONTRIB for node in b.nodes):
        opsets[CONTRIB] = 1
    return opsets


def _properties(b: Builder, metadata: Mapping[str, Any]) -> dict[str, str]:
    from .bundle import planish_version

    told: dict[str, Any] = {
        **metadata,
        "version": planish_version(),
        "profile": b.options.profile,
        "activations": b.options.activations,
        "history": b.program.history.to_json(),
    }
    if b.notes:
        told["notes"] = b.notes
    return {
        f"planish.{key}": value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in told.items()
    }


TARGET = Target(
    name="onnx",
    export=export,
    profiles=("ort", "standard"),
    doc="model.onnx for onnxruntime (profile ort) or for any ONNX runtime (profile standard)",
    options={
        "activations": ("float", "int8"),
        "logits": ("all", "last"),
        "attention": ("onnx", "mha"),
    },
)
