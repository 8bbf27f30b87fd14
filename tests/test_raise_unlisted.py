"""Architectures that no table of ours lists: what is raised follows from their data flow alone.

Tiny models with random weights, each chosen for a spelling that the public list does not have.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from attention_programs import Seen, seen
from captured import kept
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.passes.canonicalize import Canonicalize
from planish.passes.drop_dead import DropDead
from planish.passes.pipeline import Pipeline
from planish.passes.raise_attention import RaiseAttention
from planish.passes.raise_rotary import RaiseRotary
from torch import Tensor

VOCABULARY, WINDOW = 97, 8
_NAMES: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
_SIZES: dict[str, Any] = _NAMES | {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "num_hidden_layers": 1,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2}
_EMBEDDED: dict[str, Any] = _NAMES | {"n_embd": 48, "n_head": 6, "n_positions": 64, "n_layer": 1}

LAYERS = ("sliding_attention", "full_attention")
CAUSAL: Seen = (True, 0, 0.0, False, "none")
PADDED: Seen = (True, 0, 0.0, False, "keys")
MASKED: Seen = (False, 0, 0.0, False, "scores")
EXPLICIT = "keeps an explicit mask: its positional part is neither causal nor a window"
DATA = "keeps a mask of queries by keys: it depends on the inputs"


@dataclass(frozen=True)
class Case:
    """config: the configuration class. attentions, rotary: what is to be found.

    padded: captured with an attention mask. told: notes and declines.
    """

    config: str
    options: Mapping[str, Any]
    attentions: list[Seen]
    rotary: int = 0
    padded: bool = True
    told: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"
    form: str = "eager"


CASES: dict[str, Case] = {
    "a window in a stored table": Case(
        "GPTNeoConfig",
        _NAMES
        | {"hidden_size": 48, "num_heads": 6, "num_layers": 2, "intermediate_size": 80}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 30}
        | {"max_position_embeddings": 64},
        [CAUSAL, (True, 30, 0.0, False, "none")],
        padded=False,
    ),
    "the scale after the mask, rotary over shuffled projections": Case(
        "CodeGenConfig",
        _EMBEDDED | {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
        [PADDED],
        rotary=2,
    ),
    "linear biases under a compared mask": Case(
        "FalconConfig",
        _SIZES | {"multi_query": False, "alibi": True},
        [PADDED],
        form="sdpa",
    ),
    "linear biases and an additive mask cast to boolean": Case(
        "MptConfig",
        _NAMES | {"d_model": 48, "n_heads": 6, "n_layers": 1, "max_seq_len": 64},
        [PADDED],
    ),
    "scores with a floor": Case(
        "XGLMConfig",
        _NAMES
        | {"d_model": 48, "attention_heads": 6, "ffn_dim": 80, "num_layers": 1}
        | {"max_position_embeddings": 64},
        [PADDED],
    ),
    "three products in one softmax": Case(
        "DebertaV2Config",
        _SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        [MASKED],
        told=(DATA,),
        auto="AutoModel",
    ),
    "two softmaxes, one subtracted": Case("DiffLlamaConfig", _GROUPED, [PADDED] * 2, rotary=2),
    "every second layer without positions": Case(
        "SmolLM3Config",
        _GROUPED | {"num_hidden_layers": 2, "no_rope_layer_interval": 2},
        [PADDED] * 2,
        rotary=2,
        form="sdpa",
    ),
    "windows to both sides": Case(
        "ModernBertConfig",
        _SIZES
        | {"local_attention": WINDOW, "num_hidden_layers": 2, "global_attn_every_n_layers": 2},
        [(False, 0, 0.0, False, "keys"), MASKED],
        rotary=4,
        told=(f"{EXPLICIT} behind a query: it sees 4 keys back and 4 ahead",),
        auto="AutoModel",
    ),
    "blocks of a text, and complex rotary": Case(
        "Llama4TextConfig",
        _GROUPED
        | {"head_dim": 10, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 80}
        | {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 3},
        [CAUSAL, MASKED],
        rotary=2,
        padded=False,
        told=(f"{EXPLICIT}: it is causal inside blocks of 8 keys",),
    ),
    "rotary by the negative angle": Case(
        "NanoChatConfig", _GROUPED, [PADDED], rotary=2, form="sdpa"
    ),
    "a norm of queries and keys, and a window": Case(
        "Gemma3TextConfig",
        _GROUPED
        | {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 12}
        | {"num_hidden_layers": 2, "layer_types": list(LAYERS)},
        [PADDED, (True, WINDOW, 0.0, False, "keys")],
        rotary=4,
    ),
    "narrow values, and complex rotary of a part": Case(
        "DeepseekV2Config",
        _SIZES
        | {"num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 14}
        | {"qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 12}
        | {"first_k_dense_replace": 1},
        [PADDED],
        rotary=2,
        form="sdpa",
    ),
    "one key for all heads, packed": Case(
        "GPTBigCodeConfig", _EMBEDDED | {"n_inner": 80}, [PADDED], form="sdpa"
    ),
    "a mask that multiplies": Case(
        "OpenAIGPTConfig",
        _EMBEDDED,
        [],
        told=("neither side of a sum of scores is a product of queries and keys",),
    ),
}


def model_of(case: Case) -> torch.nn.Module:
    config = getattr(transformers, case.config)(**case.options, use_cache=False)
    torch.manual_seed(0)
    auto = getattr(transformers, case.auto)
    model: torch.nn.Module = auto.from_config(config, attn_implementation=case.form)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn(value.shape), alpha=0.12)
    return model.eval().float()


def inputs(case: Case, batch: int, length: int) -> dict[str, Tensor]:
    """Token ids, and a mask that hides a different number of tokens at the start of each row."""
    generator = torch.Generator().manual_seed(length)
    given = {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}
    if case.padded:
        place, missing = torch.arange(length), 2 * torch.arange(batch)[:, None]
        given["attention_mask"] = (place >= missing).long()
    return given


def captured_case(case: Case) -> Program:
    made = f"{case.config} {sorted(case.options.items())} {case.padded} {case.form}"
    key = f"{case.config}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"
    return kept(key, lambda: capture_module(model_of(case), (), inputs(case, 2, 19)))


@pytest.mark.parametrize("name", CASES)
def test_unlisted(name: str) -> None:
    """Raised, and equal in numbers at two shapes, both longer than the window."""
    case = CASES[name]
    program = captured_case(case)
    probes = [program.flatten_inputs((), inputs(case, *sizes)) for sizes in ((2, 19), (3, 13))]
    steps = [Canonicalize(), DropDead(), RaiseAttention(), RaiseRotary(), DropDead()]
    after = Pipeline(steps, verify="numbers", on_break="raise").run(program, probes=probes)
    records = {record.name: record for record in after.history}
    attention, rotary = records["raise_attention"], records["raise_rotary"]
    assert Counter(seen(after)) == Counter(case.attentions)
    notes = {entry.note for entry in attention.applied} - {""}
    assert notes | {entry.reason for entry in attention.declined} == set(case.told)
    assert (len(rotary.applied), rotary.declined) == (case.rotary, [])
