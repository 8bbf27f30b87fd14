"""How many scale edges each tiny architecture of two layers has, counted by hand.

Of each architecture: norm->linear, v->o, up->down, fc1->fc2, and what is blocked and why. A norm
counts once however many products read it; so does a projection.
"""

from __future__ import annotations

from typing import NamedTuple

RESIDUAL = "joins it with other values (a residual)"
RETURNED = "is returned by the program"
TIED = "is tied"


class Counts(NamedTuple):
    norms: int
    values: int
    ups: int
    relus: int
    blocked: dict[str, str]
    """For some weights whose channels take no factor, a part of the sentence that says why."""


def _decoder(norms: int = 5, ups: int = 2, head: str = "model.norm.weight", **more: str) -> Counts:
    blocked = {"model.layers.0.mlp.gate_proj.weight": "takes the"} if ups else {}
    if norms == 4:
        blocked[head] = TIED
    return Counts(norms, 2, ups, 0, blocked | more)


_PACKED_SILU = {"model.layers.0.mlp.gate_up_proj.weight": "takes the silu of it"}
COUNTS: dict[str, Counts] = {
    # Two norms a layer and the last one before the head, which has weights of its own.
    "llama": _decoder(),
    "qwen2": _decoder(),
    "mistral": _decoder(),
    # Tied heads: the table would have to take s as a head and 1/s as a table.
    "gemma": _decoder(4),
    "gemma2": _decoder(4),  # the norms after each block feed the residual
    "phi3": Counts(5, 2, 2, 0, _PACKED_SILU),  # of the packed rows, those of v and of up
    # GELU is not homogeneous, so fc1 -> fc2 is blocked; the head is tied.
    "gpt2": Counts(4, 2, 0, 0, {"transformer.h.0.mlp.c_fc.weight": "gelu"}),
    "opt": Counts(4, 2, 0, 2, {"model.decoder.final_layer_norm.weight": TIED}),
    "bloom": Counts(
        4,
        2,
        0,
        0,
        {
            "transformer.h.0.mlp.dense_h_to_4h.weight": "gelu",
            "transformer.word_embeddings_layernorm.weight": RESIDUAL,
        },
    ),
    # One norm a layer feeds attention and MLP, and all their products take s.
    "cohere": Counts(2, 2, 2, 0, {"model.norm.weight": TIED}),
    # The up half is clamped and raised by 1; norms feed routers and stacked experts, which take s.
    "gpt_oss": Counts(
        5, 2, 0, 0, {"model.layers.0.mlp.experts.gate_up_proj": "cuts values at fixed numbers"}
    ),
    "mixtral": Counts(5, 2, 2, 0, {"model.layers.0.mlp.gate.weight": "softmax"}),
    # Low-rank queries and keys have a norm each: 4 a layer. Layer 1: routed and shared experts.
    "deepseek_v3": Counts(9, 2, 3, 0, {"model.layers.1.mlp.gate.weight": "sigmoid"}),
    # Norms into the input projections; the last is tied. The scan is left alone.
    "mamba": Counts(2, 0, 0, 0, {"backbone.layers.0.mixer.conv1d.weight": "silu"}),
    # Post-norm: every norm feeds the residual; the last is returned.
    "bert": Counts(
        0,
        2,
        0,
        0,
        {
            "embeddings.LayerNorm.weight": RESIDUAL,
            "encoder.layer.0.attention.output.LayerNorm.weight": RESIDUAL,
            "encoder.layer.1.output.LayerNorm.weight": RETURNED,
            "encoder.layer.0.intermediate.dense.weight": "gelu",
        },
    ),
    "distilbert": Counts(
        0,
        2,
        0,
        0,
        {
            "embeddings.LayerNorm.weight": RESIDUAL,
            "transformer.layer.1.output_layer_norm.weight": RETURNED,
        },
    ),
    "vit": Counts(4, 2, 0, 0, {"layernorm.weight": RETURNED}),
    # Encoder 2 + 2, decoder 3 + 3; the last of the encoder is returned too, the decoder's is tied.
    # Values of 2 + 2 + 2 attentions; ReLU in all four MLPs.
    "t5": Counts(
        10,
        6,
        0,
        4,
        {
            "encoder.final_layer_norm.weight": RETURNED,
            "decoder.final_layer_norm.weight": TIED,
        },
    ),
    "bart": Counts(
        0,
        6,
        0,
        0,
        {
            "model.encoder.layers.0.final_layer_norm.weight": RESIDUAL,
            "model.encoder.layers.1.final_layer_norm.weight": RETURNED,
            "model.decoder.layers.1.final_layer_norm.weight": TIED,
        },
    ),
    "whisper": Counts(
        10,
        6,
        0,
        0,
        {
            "model.encoder.layer_norm.weight": RETURNED,
            "model.decoder.layer_norm.weight": TIED,
            "model.encoder.conv1.weight": "gelu",
        },
    ),
}
