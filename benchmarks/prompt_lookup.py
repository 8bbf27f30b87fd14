"""Prompt lookup against plain decoding, same decoder, same run, prompts interleaved.

python benchmarks/prompt_lookup.py PROGRAM --threads 2 [--draft-tokens 7] [--repeats 3]

PROGRAM is a folder of a saved program with a KV cache (run by TorchDecoder) or a decoder folder
(run by onnxruntime). The prompts are benchmarks/repetitive_prompts.json: edits, corrections,
extracts. Greedy; the texts must be the same token for token, and the table says where they are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from planish.decoder import Decoder
from planish.demo_models import LANGUAGE_MODEL, hf_folder
from planish.draft_ngram import NgramDrafter
from planish.generator import plain_tokens
from planish.sampling import Sampling
from planish.speculate import Statistics, speculative
from planish.tokenizer import Tokenizer

_PROMPTS = Path(__file__).with_name("repetitive_prompts.json")


def open_decoder(path: Path, threads: int) -> Decoder:
    if (path / "graph.json").is_file():
        from planish.decode_torch import TorchDecoder
        from planish.ir.program_folder import load_program

        torch.set_num_threads(threads)
        return TorchDecoder(load_program(path))
    from planish.generator import Generator

    return Generator(path, threads=threads).decoder


def run(decoder: Decoder, ids: list[int], count: int, end: int, drafts: int | str | None) -> Any:
    """(seconds after the first token, tokens, statistics)."""
    decoder.rewind(0)
    told = Statistics()
    if drafts is None:
        stream = plain_tokens(decoder, ids, Sampling(), count)
    else:
        stream = speculative(
            decoder,
            NgramDrafter(),
            ids,
            Sampling(),
            count,
            draft_tokens=None if isinstance(drafts, str) else drafts,
            stop={end},
            statistics=told,
        )
    text = [next(stream)]
    begun = time.perf_counter()
    for token in stream:
        text.append(token)
        if token == end:
            break
    return time.perf_counter() - begun, text, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-tokens", type=int, help="default: the decoder's")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    decoder = open_decoder(asked.program, asked.threads)
    tokenizer = Tokenizer(hf_folder(LANGUAGE_MODEL))
    data = json.loads(_PROMPTS.read_text())
    [end] = tokenizer.encode("<|im_end|>", special=False)
    spent = [0.0, 0.0]
    total = Statistics()
    print("| prompt | tokens | plain tok/s | lookup tok/s | ratio | tokens per step | same |")
    print("|---|---|---|---|---|---|---|")
    for entry in data["prompts"]:
        chat = tokenizer.spell_chat([{"role": "user", "content": entry["prompt"]}])
        ids = tokenizer.encode(chat, special=False)
        times: tuple[list[float], list[float]] = ([], [])
        texts: list[list[int]] = [[], []]
        told = Statistics()
        for _ in range(asked.repeats):
            for way, drafts in enumerate((None, asked.draft_tokens or "own")):
                seconds, texts[way], told = run(decoder, ids, data["max_new_tokens"], end, drafts)
                times[way].append(seconds)
        plain, drafted = (statistics.median(column) for column in times)
        spent = [spent[0] + plain, spent[1] + drafted]
        total.steps, total.drafted = total.steps + told.steps, total.drafted + told.drafted
        total.accepted += told.accepted
        count = len(texts[0]) - 1
        print(
            f"| {entry['name']} | {count + 1} | {count / plain:.1f} | "
            f"{(len(texts[1]) - 1) / drafted:.1f} | {plain / drafted:.2f} | "
            f"{told.tokens_per_step:.2f} | {'yes' if texts[0] == texts[1] else 'NO'} |"
        )
    print(f"| all | | | | {spent[0] / spent[1]:.2f} | {total.tokens_per_step:.2f} | |")
    print(f"{total}; ratio of total times, medians of {asked.repeats} interleaved repeats")


if __name__ == "__main__":
    main()
