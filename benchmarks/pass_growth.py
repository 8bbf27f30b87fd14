"""How the time of capture and of the `exact` recipe grows with the number of layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import planish
import torch
import transformers
from planish.bench_results import Results
from planish.recipes import pipeline


def measure_growth(
    results: Results, layers: Sequence[int], tell: Callable[[str], None], rounds: int = 3
) -> None:
    """Records `passes`: the fastest of some rounds, seconds, one thread, no numeric verification.

    The models are narrow, so that what is timed is the graph's size and not the weights'.
    """
    for count in layers:
        if results.get("passes", measure=count) is not None:
            continue
        tell(f"capture and passes of {count} layers")
        model = _narrow(count)
        captures: list[float] = []
        runs: list[float] = []
        for _ in range(rounds):
            begun = time.perf_counter()
            program = planish.trace(model, (torch.zeros(2, 16, dtype=torch.int64),))
            captures.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            pipeline("exact", verify="structure").run(program)
            runs.append(time.perf_counter() - begun)
        results.add("passes", measure=count, capture=min(captures), pipeline=min(runs))


def _narrow(layers: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()
