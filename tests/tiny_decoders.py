"""A tiny random decoder with a byte-level tokenizer, as a model folder and as exported folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import planish
import torch
import transformers
from planish.decoder_source import DecoderSource
from planish.ir.program import Program
from planish.passes.keep_last_logits import KeepLastLogits
from planish.passes.pipeline import Pipeline
from planish.recipes import find_recipe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTEXT = 96
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BEGIN, END = range(3)
PROFILES = {"shared": "ort", "growing": "standard"}
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer() -> Any:
    """A token for each byte, and some for pairs, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["th", "he", "in", "er", "an", "\u0120t", "\u0120a"]
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *alphabet, *pairs])}
    made = Tokenizer(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in pairs]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    pad, begin, end = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, bos_token=begin, eos_token=end, chat_template=CHAT
    )


@functools.cache
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=0.2,
        use_cache=False,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    torch.random.set_rng_state(state)
    return made


def greedy(ids: list[int], count: int) -> list[int]:
    """What transformers generates."""
    found = model().generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, use_cache=True
    )
    return found[0, len(ids) :].tolist()


@functools.cache
def program() -> Program:
    """The model with a cache."""
    ids = torch.randint(3, len(tokenizer()), (2, 11))
    made = planish.optimize(model(), (ids,), recipe="exact", kv_cache=True)
    return made.program


def source(base: Path) -> Path:
    """The model as a Hugging Face folder with its tokenizer."""
    folder = base / "model"
    if not folder.exists():
        model().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def exported(base: Path, form: str = "shared", rows: int = 0, text: bool = True) -> Path:
    """A decoder folder. rows: logits of the last positions only; text: with a tokenizer."""
    folder = base / f"decoder-{form}-{rows}-{text}"
    if folder.exists():
        return folder
    made = Pipeline([KeepLastLogits(count=rows)]).run(program()) if rows else program()
    known = DecoderSource.of(source(base) if text else model())
    done = planish.Optimized(made, find_recipe("exact"), source=known)
    return done.export(folder, target="onnx", profile=PROFILES[form])
