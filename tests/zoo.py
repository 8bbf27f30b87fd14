"""Tiny random models of many architectures, made from their configuration classes alone.

Every size is chosen to tell axes apart: a head is not hidden / heads wide and no weight is square
where the architecture leaves the choice, query and key heads differ in number, and sequences are
longer than the sliding windows.

    sample = zoo.build("llama", attention="sdpa")
    program = torch.export.export(
        sample.model, sample.args, sample.kwargs,
        dynamic_shapes=sample.dynamic_shapes, strict=False,
    )
    program.module()(**sample.other_inputs())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

Attention = Literal["sdpa", "eager"]
InputKind = Literal["decoder", "encoder", "encoder-decoder", "image", "speech"]
DynamicShapes = dict[str, dict[int, Any]]

BATCH, LENGTH = 2, 19
VOCABULARY = 97
WINDOW = 8
IMAGE = (24, 30)
MEL_BINS, FRAMES = 10, 26
PERTURBATION = 0.12

_BOTH: tuple[Attention, ...] = ("sdpa", "eager")
_EAGER: tuple[Attention, ...] = ("eager",)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2, "head_dim": 10}


@dataclass(frozen=True)
class Architecture:
    """How to make one tiny model: its configuration, its class and the inputs it takes.

    ``options`` are arguments of the configuration class; ``layer_keys`` name the options that hold
    the number of layers. ``fixed`` names dimensions that cannot be dynamic, and says why.
    """

    config_class: str
    auto_class: str
    inputs: InputKind
    options: Mapping[str, Any]
    attentions: tuple[Attention, ...] = _BOTH
    layer_keys: tuple[str, ...] = ("num_hidden_layers",)
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Sample:
    """A model in eval mode (float32, no cache) with the inputs to capture it with.

    ``dynamic_shapes`` goes to ``torch.export.export`` as it is: per input, the dynamic dimensions.
    """

    name: str
    attention: Attention
    model: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    dynamic_shapes: DynamicShapes
    _make: Callable[[int, int, int], dict[str, Tensor]]

    def other_inputs(self, batch: int = 3, length: int = 13, seed: int = 7) -> dict[str, Tensor]:
        """Inputs of a second shape; a dimension the architecture fixes keeps its size."""
        return self._make(batch, length, seed)


def _causal(config_class: str, options: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture(config_class, "AutoModelForCausalLM", "decoder", options, **more)


_ENCODER_DECODER: dict[str, Any] = {
    **_SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 56,
    "decoder_start_token_id": 2,
}
_UNROLLED = "the scan over time is a Python loop: export unrolls it for one length"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _causal("LlamaConfig", _GROUPED),
    "qwen2": _causal("Qwen2Config", _GROUPED),
    "gemma": _causal("GemmaConfig", _GROUPED | {"num_key_value_heads": 1}),
    "gemma2": _causal(
        "Gemma2Config",
        _GROUPED
        | {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        attentions=_EAGER,
    ),
    "mistral": _causal("MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "phi3": _causal("Phi3Config", _SIZES | _SPECIAL | {"num_key_value_heads": 2}),
    "gpt2": _causal(
        "GPT2Config",
        _SPECIAL
        | {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_head": 6,
            "n_inner": 80,
            "n_positions": 64,
        },
        layer_keys=("n_layer",),
    ),
    "opt": _causal(
        "OPTConfig",
        _SPECIAL
        | {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "num_attention_heads": 6,
            "ffn_dim": 80,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": _causal(
        "BloomConfig",
        _SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 48, "n_head": 6},
        attentions=_EAGER,
        layer_keys=("n_layer",),
    ),
    "cohere": _causal(
        "CohereConfig",
        _SIZES | _SPECIAL | {"num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 0.3},
    ),
    "gpt_oss": _causal(
        "GptOssConfig",
        _GROUPED
        | {
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        attentions=_EAGER,
    ),
    "mixtral": _causal(
        "MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "deepseek_v3": _causal(
        "DeepseekV3Config",
        _SIZES
        | _SPECIAL
        | {
            "num_key_value_heads": 6,
            "q_lora_rank": 20,
            "kv_lora_rank": 14,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 10,
            "v_head_dim": 12,
            "moe_intermediate_size": 28,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "mamba": _causal(
        "MambaConfig",
        _SPECIAL
        | {"vocab_size": VOCABULARY, "hidden_size": 48, "state_size": 5, "time_step_rank": 7},
        attentions=_EAGER,
        fixed={"length": _UNROLLED},
    ),
    "bert": Architecture("BertConfig", "AutoModel", "encoder", _SIZES | _SPECIAL),
    "distilbert": Architecture(
        "DistilBertConfig",
        "AutoModel",
        "encoder",
        _SPECIAL
        | {
            "vocab_size": VOCABULARY,
            "dim": 48,
            "n_heads": 6,
            "hidden_dim": 80,
            "max_position_embeddings": 64,
        },
        layer_keys=("n_layers",),
    ),
    "vit": Architecture(
        "ViTConfig",
        "AutoModel",
        "image",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "intermediate_size": 80,
            "image_size": list(IMAGE),
            "patch_size": 6,
            "num_channels": 3,
        },
        fixed={"length": "the position table is made for one image size"},
    ),
    "t5": Architecture(
        "T5Config",
        "AutoModelForSeq2SeqLM",
        "encoder-decoder",
        {
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 10,
            "d_ff": 80,
            "num_heads": 6,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
        layer_keys=("num_layers", "num_decoder_layers"),
    ),
    "bart": Architecture(
        "BartConfig",
        "AutoModelForSeq2SeqLM",
        "encoder-decoder",
        _ENCODER_DECODER | {"max_position_embeddings": 64},
        layer_keys=("encoder_layers", "decoder_layers"),
    ),
    "whisper": Architecture(
        "WhisperConfig",
        "AutoModelForSpeechSeq2Seq",
        "speech",
        _ENCODER_DECODER
        | {
            "num_mel_bins": MEL_BINS,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        layer_keys=("encoder_layers", "decoder_layers"),
        fixed={"frames": "the encoder takes exactly one window of audio"},
    ),
}

CASES: list[tuple[str, Attention]] = [
    (name, attention)
    for name, architecture in ARCHITECTURES.items()
    for attention in architecture.attentions
]


def build(name: str, attention: Attention = "sdpa", layers: int = 2, seed: int = 0) -> Sample:
    """The tiny model of one architecture with inputs of ``BATCH`` x ``LENGTH`` (or an image).

    :raises ValueError: the architecture does not offer this form of attention.
    """
    architecture = ARCHITECTURES[name]
    if attention not in architecture.attentions:
        raise ValueError(f"{name} offers {architecture.attentions}, not {attention}")
    model = _model(architecture, attention, layers, seed)

    def make(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        return _inputs(architecture, batch, length, seed)

    return Sample(
        name=name,
        attention=attention,
        model=model,
        args=(),
        kwargs=make(BATCH, LENGTH, seed),
        dynamic_shapes=_dynamic_shapes(architecture),
        _make=make,
    )


def _model(architecture: Architecture, attention: Attention, layers: int, seed: int) -> nn.Module:
    counts = dict.fromkeys(architecture.layer_keys, layers)
    config_class = getattr(transformers, architecture.config_class)
    config = config_class(**architecture.options, **counts, use_cache=False)
    auto_class = getattr(transformers, architecture.auto_class)
    # Grouped matmul, the default of expert layers on a CPU, exports as an op no other runtime has.
    has_experts = any("experts" in key for key in architecture.options)
    more = {"experts_implementation": "batched_mm"} if has_experts else {}
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model: nn.Module = auto_class.from_config(config, attn_implementation=attention, **more)
    torch.random.set_rng_state(generator_state)
    _perturb(model, seed)
    return model.eval().float()


def _perturb(model: nn.Module, seed: int) -> None:
    """Move every stored value, so that no norm weight is 1 and no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for value in model.state_dict().values():
        if value.is_floating_point() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            value.add_(torch.randn(value.shape, generator=generator), alpha=PERTURBATION)


def _tokens(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def _padding(batch: int, length: int, side: Literal["left", "right"]) -> Tensor:
    """A mask int64[batch, length]: the first row is full, row i lacks 2 i + 1 tokens."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        missing = min(2 * row + 1, length - 1)
        if side == "left":
            mask[row, :missing] = 0
        else:
            mask[row, length - missing :] = 0
    return mask


def _inputs(architecture: Architecture, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    length = LENGTH if "length" in architecture.fixed else length
    if architecture.inputs == "image":
        return {"pixel_values": torch.randn(batch, 3, *IMAGE, generator=generator)}
    target = length // 2 + 2
    if architecture.inputs == "speech":
        features = torch.randn(batch, MEL_BINS, FRAMES, generator=generator)
        return {
            "input_features": features,
            "decoder_input_ids": _tokens(batch, target, generator),
        }
    side = "left" if architecture.inputs == "decoder" else "right"
    inputs = {
        "input_ids": _tokens(batch, length, generator),
        "attention_mask": _padding(batch, length, side),
    }
    if architecture.inputs == "encoder-decoder":
        inputs["decoder_input_ids"] = _tokens(batch, target, generator)
    return inputs


def _dynamic_shapes(architecture: Architecture) -> DynamicShapes:
    shapes: DynamicShapes = {}
    for name, value in _inputs(architecture, BATCH, LENGTH, 0).items():
        is_sequence = value.dim() == 2 and "length" not in architecture.fixed
        axes = (0, 1) if is_sequence else (0,)
        shapes[name] = dict.fromkeys(axes, Dim.DYNAMIC)
    return shapes
