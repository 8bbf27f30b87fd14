"""Time TorchDecoder against the model in eager PyTorch with its own cache, in one run.

    python benchmarks/decode_torch.py MODEL --recipes int4 int8 --threads 1 --prompt 512

MODEL is a Hugging Face folder or a GGUF file. Everything is run in turn, round after round;
medians and ratios to eager float32 are told. With one thread the processor's own time is taken,
which other processes do not lengthen. `int4+int8` is the recipe int4 with activations of the
prompt rounded to 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from planish.decode_torch import TorchDecoder
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.ir.read_gguf import gguf_folder
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor


class Eager:
    """The model as its users run it: `advance` and `rewind` of a decoder."""

    def __init__(self, model: Any) -> None:
        self.model, self.past = model, None

    def advance(self, tokens: list[int], last: int) -> Tensor:
        ids = torch.tensor([tokens])
        found = self.model(ids, past_key_values=self.past, use_cache=True)
        self.past = found.past_key_values
        return found.logits[0, -last:]

    def rewind(self, length: int) -> None:
        if length == 0:
            self.past = None
        elif self.past is not None and self.past.get_seq_length() > length:
            self.past.crop(length - self.past.get_seq_length())


def captured(model: Any) -> Program:
    model.config.use_cache = False
    program = capture_module(model, (), {"input_ids": torch.randint(0, 999, (2, 7))})
    model.config.use_cache = True
    return program


def decoders(program: Program, names: list[str]) -> dict[str, TorchDecoder]:
    made: dict[str, TorchDecoder] = {}
    for name in names:
        recipe, _, activations = name.partition("+")
        small = pipeline(recipe, verify="structure").run(program)
        small = Pipeline([InsertKvCache()], verify="structure").run(small)
        begun = time.perf_counter()
        made[name] = TorchDecoder(small, activations or "float32")
        print(f"{name}: made in {time.perf_counter() - begun:.1f} s", flush=True)
    return made


def median(clock: Callable[[], float], calls: dict[str, Callable[[], Any]], rounds: int,
           repeats: int) -> dict[str, float]:  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(0.05)  # threads of the one that ran before spin for a while
            for _ in range(repeats if turn else 1):
                begun = clock()
                call()
                taken[name].append(clock() - begun)
            if not turn:
                taken[name].clear()
    return {name: statistics.median(times) for name, times in taken.items()}


def told(what: str, tokens: int, seconds: dict[str, float]) -> None:
    base = seconds["eager"]
    for name, value in seconds.items():
        print(f"{what}  {name}: {value * 1e3:.2f} ms, {tokens / value:.0f} tok/s, "
              f"{base / value:.2f}x eager", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["int4", "int4+int8", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--past", type=int, default=128, help="tokens before those decoded")
    parser.add_argument("--drafts", type=int, default=4, help="tokens verified at once")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    folder = options.model if options.model.is_dir() else gguf_folder(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    contestants: dict[str, Any] = decoders(captured(model), options.recipes)
    contestants = {"eager": Eager(model), **contestants}
    ids = torch.randint(0, model.config.vocab_size, (options.prompt,)).tolist()

    def from_start(decoder: Any, tokens: list[int]) -> Callable[[], Any]:
        def call() -> None:
            decoder.rewind(0)
            decoder.advance(tokens, 1)

        return call

    def after_past(decoder: Any, tokens: list[int]) -> Callable[[], Any]:
        def call() -> None:
            decoder.rewind(options.past)
            decoder.advance(tokens, len(tokens))

        return call

    prefill = {name: from_start(decoder, ids) for name, decoder in contestants.items()}
    told("prefill", len(ids), median(clock, prefill, options.rounds, 1))
    for count in (1, options.drafts):
        for decoder in contestants.values():
            decoder.rewind(0)
            decoder.advance(ids[: options.past], 1)
        calls = {n: after_past(d, ids[:count]) for n, d in contestants.items()}
        what = "decode " if count == 1 else f"verify {count}"
        told(what, count, median(clock, calls, options.rounds, 10))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
