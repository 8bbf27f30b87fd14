"""What it costs to round a model of 7 billion parameters: seconds and peak memory.

    python benchmarks/large_model.py make FOLDER              # 13.5 GB of random bfloat16 weights
    python benchmarks/large_model.py measure FOLDER OUT --recipe rtn.yaml

`measure` runs `planish export FOLDER --target torch` in a process of its own and compares it with
reading every byte of FOLDER and writing every byte of OUT, both with the files' caches dropped
before. Peak memory is the process's largest resident set, mapped files included. Capturing (tracing
32 layers in Python) takes as long for a small model of as many layers, so it is told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from planish.ir.write_safetensors import Planned, write_safetensors
from torch import Tensor

_SHARD = 4 << 30
_BLOCK = 1 << 24
_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of the checkpoint."""
    hidden, wide, words = 4096, 11008, 32000
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in "qkvo":
            found[f"{at}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        found[f"{at}.mlp.gate_proj.weight"] = found[f"{at}.mlp.up_proj.weight"] = (wide, hidden)
        found[f"{at}.mlp.down_proj.weight"] = (hidden, wide)
        found[f"{at}.input_layernorm.weight"] = (hidden,)
        found[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def make(folder: Path, layers: int) -> None:
    """A checkpoint in shards of 4 GB; its tensors are pieces of one random block, for speed."""
    folder.mkdir(parents=True)
    block = (torch.randn(_BLOCK + 4099) * 0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        plans = {n: Planned(s, torch.bfloat16, _piece(block, n, s)) for n, s in shard.items()}
        write_safetensors(folder / file, plans)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = _LLAMA_7B | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _piece(block: Tensor, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    count = torch.Size(shape).numel()
    start = hash(name) % 4099

    def make() -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        whole = block[start : start + _BLOCK]
        return whole.repeat(-(-count // _BLOCK))[:count].reshape(shape)

    return make


def measure(folder: Path, out: Path, arguments: list[str]) -> None:
    """Export in a process of its own, then the same bytes read and written and nothing else."""
    drop_caches(folder)
    told = out.with_name(out.name + ".json")
    command = [sys.executable, "-m", "planish", "export", str(folder), "--out", str(out)]
    command += ["--json", str(told)]
    start = time.perf_counter()
    subprocess.run([*command, "--target", "torch", "--force", *arguments], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    drop_caches(folder)
    drop_caches(out)
    bare = read_and_write(folder, out)
    parts = json.loads(told.read_text())["seconds"]
    row = {
        "seconds": round(seconds, 1),
        "parts": {name: round(spent, 1) for name, spent in parts.items()},
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "reading_and_writing": round(bare, 1),
        "ratio": round(seconds / bare, 2),
        "ratio_without_capture": round((seconds - parts["capture"]) / bare, 2),
        "peak_mb": round(used.ru_maxrss / 1024),
        "gb_read": round(_size(folder) / 1e9, 2),
        "gb_written": round(_size(out) / 1e9, 2),
    }
    print(json.dumps(row))


def drop_caches(folder: Path) -> None:
    """Let the system forget the files' contents, as far as it lets us."""
    os.sync()
    for file in _files(folder):
        with file.open("rb") as stream, contextlib.suppress(OSError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_write(folder: Path, out: Path) -> float:
    """Seconds to read the one and to write as many bytes as the other holds."""
    buffer = bytearray(1 << 24)
    start = time.perf_counter()
    for file in _files(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    scratch = out.with_name(out.name + ".copy")
    with scratch.open("wb", buffering=0) as stream:
        left = _size(out)
        while left > 0:
            left -= stream.write(memoryview(buffer)[:left])
    os.sync()
    seconds = time.perf_counter() - start
    scratch.unlink()
    return seconds


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32)
    options, rest = parser.parse_known_args()
    if options.what == "make":
        make(options.folder, options.layers)
    else:
        measure(options.folder, options.out, rest)


if __name__ == "__main__":
    main()
