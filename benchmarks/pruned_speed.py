"""Tokens a second of SmolLM2-135M before and after a structured cut, in PyTorch and in ONNX.

    python benchmarks/pruned_speed.py --budget 0.3 --threads 2 --repeats 7

The cut takes that part of all parameters: FFN channels, head groups and residual width in like
shares, as far as groups of heads and multiples of 32 allow; what really went is told. Both models
are float32, after the recipes `exact` and `cut`, with a KV cache; their runs are interleaved,
medians are taken, and the ratio is that of the cut model to the whole one. Quality is no subject
here: weights go by magnitude.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from planish.api import Optimized, optimize, trace
from planish.decode_onnx import OnnxDecoder
from planish.decode_torch import TorchDecoder
from planish.decoder import Decoder
from planish.demo_models import LANGUAGE_MODEL, hf_folder

PROMPT, NEW, PREFILL = 128, 48, 512


def prefill(decoder: Decoder) -> float:
    """Tokens/s of a prompt of PREFILL tokens, of which only the last position's logits are read."""
    decoder.rewind(0)
    tokens = [(7 * place) % 40_000 + 100 for place in range(PREFILL)]
    start = time.perf_counter()
    decoder.advance(tokens, 1)
    return PREFILL / (time.perf_counter() - start)


def decode(decoder: Decoder) -> float:
    """Tokens/s of NEW tokens one after the other, after PROMPT tokens."""
    decoder.rewind(0)
    decoder.advance([(11 * place) % 40_000 + 100 for place in range(PROMPT)], 1)
    start = time.perf_counter()
    for place in range(NEW):
        decoder.advance([place + 100], 1)
    return NEW / (time.perf_counter() - start)


MEASURES: dict[str, Callable[[Decoder], float]] = {"prefill": prefill, "decode": decode}


def models(budget: float, multiple: int) -> dict[str, Optimized]:
    program = trace(hf_folder(LANGUAGE_MODEL), kv_cache=True)
    options: dict[str, float] = {f"cut.{kind}": 0.5 for kind in ("ffn", "heads", "width")}
    options |= {"cut.budget": budget, "cut.multiple": multiple}
    return {
        "whole": optimize(program, recipe="exact", kv_cache=True),
        "cut": optimize(program, recipe="cut", options=options, kv_cache=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--multiple", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = models(options.budget, options.multiple)
    counts = {name: model.program.parameter_count() for name, model in made.items()}
    print(json.dumps({"parameters": counts, "kept": counts["cut"] / counts["whole"]}))
    with TemporaryDirectory() as scratch:
        for target in ("torch", "onnx"):
            decoders: dict[str, Decoder] = {}
            for name, model in made.items():
                if target == "torch":
                    decoders[name] = TorchDecoder(model.program)
                else:
                    written = model.export(Path(scratch) / name, target="onnx")
                    decoders[name] = OnnxDecoder(written, threads=options.threads)
            for what, measure in MEASURES.items():
                rates: dict[str, list[float]] = {name: [] for name in decoders}
                for repeat in range(options.repeats + 1):
                    for name, decoder in decoders.items():
                        rate = measure(decoder)
                        if repeat:  # the first warms up
                            rates[name].append(rate)
                medians = {name: statistics.median(found) for name, found in rates.items()}
                ratios = [b / a for a, b in zip(rates["whole"], rates["cut"], strict=True)]
                row = {"target": target, "measure": what, "tokens/s": medians}
                row |= {"ratio": statistics.median(ratios), "least": min(ratios)}
                row |= {"greatest": max(ratios), "threads": options.threads}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
