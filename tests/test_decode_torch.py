"""TorchDecoder: what the whole text gives, token by token, in pieces, and after going back."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from captured import sample
from planish.codegen.lower_decode import CannotDecode
from planish.decode_torch import TorchDecoder
from planish.ir.capture import capture_module
from planish.ir.errors import TextTooLong, WrongInput
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import plan_cpu
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor

pytestmark = pytest.mark.skipif(plan_cpu.why_not() is not None, reason="no C compiler here")

DECODERS: list[tuple[str, zoo.Attention]] = [
    ("llama", "sdpa"),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
    ("gpt2", "sdpa"),
    ("mistral", "eager"),
    ("cohere", "sdpa"),
    ("phi3", "sdpa"),
    ("mixtral", "sdpa"),
    ("deepseek_v3", "sdpa"),
]
QUANTIZED = QuantizeWeights(
    bits=4, group_size=32, remainder="short", embeddings="int8-g32-sym-f32", skip="*experts*"
)


@functools.cache
def plain(name: str, attention: zoo.Attention, packed: bool) -> Program:
    made = sample(name, attention)
    program = capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
    program = pipeline("exact").run(program)
    return Pipeline([QUANTIZED], verify="structure").run(program) if packed else program


@functools.cache
def cached(name: str, attention: zoo.Attention, packed: bool) -> Program:
    return Pipeline([InsertKvCache()], verify="structure").run(plain(name, attention, packed))


def in_pieces(decoder: TorchDecoder, ids: Tensor, cuts: list[int]) -> Tensor:
    bounds = zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)
    return torch.cat([decoder.advance(ids[0, start:end].tolist()) for start, end in bounds])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_it_gives_what_the_whole_text_gives(
    name: str, attention: zoo.Attention, packed: bool
) -> None:
    """In float32 no further from a float64 run than the interpreter, four times its error granted
    for another order of the same sums."""
    program = plain(name, attention, packed)
    decoder = TorchDecoder(cached(name, attention, packed))
    torch.manual_seed(0)
    ids = torch.randint(3, zoo.VOCABULARY, (1, 29))
    truth = run(program, [ids], float64=True)[0][0]
    own = (run(program, [ids])[0][0] - truth).norm()
    for cuts in (list(range(1, 29)), [5, 6, 20], []):
        decoder.rewind(0)
        found = in_pieces(decoder, ids, cuts)
        assert found.dtype == torch.float32 and found.shape == truth.shape
        assert (found - truth).norm() <= 4 * own, cuts
    assert decoder.length == 29
