"""One contestant of the decoding benchmark, in a process of its own.

python decode_worker.py KIND PATH THREADS; then one JSON order a line on stdin, one answer a line on
stdout. It runs in the environment of its engine, so planish is imported only by its own kinds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    def start(self, ids: Sequence[int]) -> int:
        """Read a prompt into an empty cache; the most likely next token."""
        ...

    def step(self, token: int) -> int:
        """Append one token; the most likely next one."""
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """float32 [len(ids), vocabulary] of a text."""
        ...


class Planish:
    """A decoder folder in onnxruntime, or a saved program in the torch CPU target."""

    def __init__(self, path: str, threads: int, kind: str) -> None:
        from pathlib import Path

        if kind == "onnx":
            from planish.decode_onnx import OnnxDecoder

            self.decoder: Any = OnnxDecoder(Path(path), threads=threads)
        else:
            import torch

            torch.set_num_threads(threads)
            from planish.decode_torch import TorchDecoder
            from planish.ir.program_folder import load_program

            activations = "int8" if kind == "torch-a8" else "float32"
            self.decoder = TorchDecoder(load_program(Path(path)), activations=activations)

    def start(self, ids: Sequence[int]) -> int:
        self.decoder.rewind(0)
        return int(self.decoder.advance(list(ids), last=1)[-1].argmax())

    def step(self, token: int) -> int:
        return int(self.decoder.advance([token], last=1)[-1].argmax())

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        self.decoder.rewind(0)
        pieces = [self.decoder.advance(list(ids[i : i + 16])) for i in range(0, len(ids), 16)]
        return np.concatenate([np.asarray(piece) for piece in pieces])


class Eager:
    """transformers with its own cache, float32."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=torch.float32).eval()
        self.cache: Any = None

    def _run(self, ids: Sequence[int]) -> Any:
        with self.torch.inference_mode():
            tokens = self.torch.tensor([list(ids)])
            result = self.model(tokens, past_key_values=self.cache, use_cache=True)
        self.cache = result.past_key_values
        return result.logits[0]

    def start(self, ids: Sequence[int]) -> int:
        self.cache = None
        return int(self._run(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return int(self._run([token])[-1].argmax())

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        self.cache = None
        return self._run(ids).numpy()


class Genai:
    """ONNX Runtime GenAI on a folder of its own model builder, or of planish."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(path)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.generator: Any = None

    def start(self, ids: Sequence[int]) -> int:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=1024, do_sample=False)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.array([list(ids)], dtype=np.int32))
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def step(self, token: int) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=1024, do_sample=False)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.array([list(ids)], dtype=np.int32))
        found = np.asarray(self.generator.get_output("logits"), dtype=np.float32)
        return found.reshape(-1, found.shape[-1])


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama

        common: dict[str, Any] = {"n_ctx": 1024, "n_threads": threads, "verbose": False}
        common |= {"n_threads_batch": threads, "n_batch": 512, "n_ubatch": 512}
        self.make = lambda everything: Llama(path, logits_all=everything, **common)
        self.model = self.make(False)

    def _best(self) -> int:
        from llama_cpp import llama_get_logits_ith

        logits = llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())

    def start(self, ids: Sequence[int]) -> int:
        self.model.reset()
        self.model.eval(list(ids))
        return self._best()

    def step(self, token: int) -> int:
        self.model.eval([token])
        return self._best()

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        model = self.make(True)
        model.eval(list(ids))
        return np.array(model.scores[: len(ids)], dtype=np.float32)


class OpenVino:
    """OpenVINO's own runtime on a stateful model that OpenVINO GenAI made of a GGUF file."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads}
        model = openvino.Core().compile_model(f"{path}/openvino_model.xml", "CPU", options)
        self.request = model.create_infer_request()
        self.length = 0

    def _run(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        new = len(ids)
        given = {
            "input_ids": np.array([list(ids)], np.int64),
            "attention_mask": np.ones((1, self.length + new), np.int64),
            "position_ids": np.arange(self.length, self.length + new, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.length += new
        return self.request.infer(given)["logits"][0]

    def start(self, ids: Sequence[int]) -> int:
        self.request.reset_state()
        self.length = 0
        return int(self._run(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return int(self._run([token])[-1].argmax())

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        self.request.reset_state()
        self.length = 0
        return np.array(self._run(ids), dtype=np.float32)


def make(kind: str, path: str, threads: int) -> Engine:
    if kind in ("onnx", "torch", "torch-a8"):
        return Planish(path, threads, kind)
    engines: dict[str, Any] = {
        "eager": Eager,
        "genai": Genai,
        "llamacpp": LlamaCpp,
        "openvino": OpenVino,
    }
    return engines[kind](path, threads)


def timed(work: Any) -> tuple[float, float, Any]:
    """(wall seconds, CPU seconds of the process, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def answer(engine: Engine, order: dict[str, Any]) -> dict[str, Any]:
    ids = order["ids"]
    if order["do"] == "prefill":
        wall, cpu, _ = timed(lambda: engine.start(ids))
        return {"wall": wall, "cpu": cpu, "tokens": len(ids)}
    if order["do"] == "decode":
        token = engine.start(ids)
        text = [token]

        def run() -> None:
            for _ in range(order["count"]):
                text.append(engine.step(text[-1]))

        wall, cpu, _ = timed(run)
        return {"wall": wall, "cpu": cpu, "tokens": order["count"], "text": text}
    return quality(engine.logits(ids), ids, order)


def quality(found: np.ndarray[Any, Any], ids: Sequence[int], order: dict[str, Any]) -> Any:
    """Against the reference's logits in order["file"]; the reference itself writes the file."""
    wide = _log_softmax(found)
    if order["write"]:
        np.save(order["file"], wide)
    wanted = np.load(order["file"], mmap_mode="r")
    kl = float((np.exp(wanted) * (wanted - wide)).sum(-1).mean())
    top = float((wanted.argmax(-1) == wide.argmax(-1)).mean())
    nll = -float(wide[np.arange(len(ids) - 1), np.asarray(ids[1:])].mean())
    return {"kl": kl, "top1": top, "nll": nll}


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))


def main() -> None:
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines that print must not print into the answers
    begun = time.perf_counter()
    engine = make(kind, path, threads)
    print(json.dumps({"load": time.perf_counter() - begun}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
