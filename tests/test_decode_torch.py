"""TorchDecoder: what the whole text gives, token by token, in pieces, and after going back."""

from __future__ import annotations

import functools

import cached_decoders
import pytest
import torch
import zoo
from planish import decode_torch
from planish.codegen.decode_plan import Called, arrange
from planish.codegen.decode_sizes import CannotDecode
from planish.codegen.lower_decode import lower_plan
from planish.decode_torch import TorchDecoder
from planish.ir.errors import TextTooLong, WrongInput
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import plan_cpu
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.keep_last_logits import KeepLastLogits
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor

pytestmark = pytest.mark.skipif(plan_cpu.why_not() is not None, reason="no C compiler here")

DECODERS: list[tuple[str, zoo.Attention]] = [
    ("llama", "sdpa"),
    ("gemma2", "eager"),  # windows, soft caps, 1 + weight norms
    ("gpt_oss", "eager"),  # sinks, experts
    ("gpt2", "sdpa"),  # learned positions, LayerNorm, [in, out] weights
    ("mistral", "eager"),  # windows
    ("cohere", "sdpa"),  # interleaved rotary
]
BITS = {0: None, 4: 32, 8: 32}


@functools.cache
def cached(name: str, attention: zoo.Attention, bits: int) -> Program:
    program = cached_decoders.cached(name, attention)
    if not bits:
        return program
    step = QuantizeWeights(
        bits=bits, group_size=BITS[bits], remainder="short", embeddings="int8-g32-sym-f32"
    )
    return Pipeline([step], verify="structure").run(program)


def truth_and_own_error(program: Program, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of the whole text in float64, and how far the interpreter's float32 is from them."""
    past = empty_past(program, 1)
    wide = run(program, [ids, *past], float64=True)[0][0]
    return wide, float((run(program, [ids, *past])[0][0] - wide).norm())


def in_pieces(decoder: TorchDecoder, ids: list[int], cuts: list[int]) -> Tensor:
    bounds = zip([0, *cuts], [*cuts, len(ids)], strict=True)
    return torch.cat([decoder.advance(ids[start:end]) for start, end in bounds])


@pytest.mark.parametrize("bits", list(BITS))
@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_it_gives_what_the_whole_text_gives(name: str, attention: zoo.Attention, bits: int) -> None:
    """No further from a float64 run than the interpreter in float32, four times its error
    granted for another order of the same sums."""
    program = cached(name, attention, bits)
    decoder = TorchDecoder(program)
    ids = cached_decoders.tokens(1, 45)
    truth, own = truth_and_own_error(program, ids)
    for cuts in (list(range(1, 45)), [5, 6, 20, 28], [3], []):
        decoder.rewind(0)
        found = in_pieces(decoder, ids[0].tolist(), cuts)
        assert found.dtype == torch.float32 and found.shape == truth.shape
        assert (found - truth).norm() <= 4 * own, cuts
    assert decoder.length == 45


def test_fused_products_run_in_c_but_for_the_embedding_and_the_angles() -> None:
    program = pipeline("exact").run(cached_decoders.raised("llama"))
    program = Pipeline([InsertKvCache()], verify="structure").run(program)
    plan = lower_plan(program, few=True)
    called = [step for step in plan.steps if isinstance(step, Called)]
    first_native = plan.steps.index(next(s for s in plan.steps if not isinstance(s, Called)))
    late = [step.call for step in called if plan.steps.index(step) > first_native + 12]
    assert not late, "layers run without torch"
    assert 0 < plan.tail < len(plan.steps)
    ids = cached_decoders.tokens(1, 21)
    truth, own = truth_and_own_error(program, ids)
    found = in_pieces(TorchDecoder(program), ids[0].tolist(), [13])
    assert (found - truth).norm() <= 4 * own


@pytest.mark.parametrize(("name", "attention"), DECODERS[:4])
def test_the_last_rows_alone(name: str, attention: zoo.Attention) -> None:
    program = cached(name, attention, 4)
    decoder = TorchDecoder(program)
    ids = cached_decoders.tokens(1, 30)[0].tolist()
    whole = decoder.advance(ids)
    for piece, last in ((30, 1), (30, 3), (5, 2), (1, 1), (6, 99)):
        decoder.rewind(0)
        found = decoder.advance(ids[:piece], last)
        wanted = whole[:piece][-last:]
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
        following = decoder.advance(ids[piece : piece + 1] or [3])
        assert following.shape == whole[:1].shape
        if piece < 30:
            assert (following - whole[piece]).norm() <= 1e-5 * whole[piece].norm()


def test_after_going_back_another_text_is_continued() -> None:
    program = cached("gemma2", "eager", 8)
    decoder = TorchDecoder(program)
    ids = cached_decoders.tokens(1, 20)[0].tolist()
    wanted = decoder.advance(ids)
    for kept in (0, 7, 19):
        decoder.rewind(kept)
        decoder.advance([5] * 9)  # a draft that is thrown away
        decoder.rewind(kept)
        assert decoder.length == kept
        found = decoder.advance(ids[kept:])
        assert (found - wanted[kept:]).norm() <= 1e-5 * wanted.norm()


def test_long_texts_are_computed_in_parts_and_buffers_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_torch, "ROOM", 16)
    program = cached("llama", "sdpa", 4)
    ids = cached_decoders.tokens(1, 150)
    truth, own = truth_and_own_error(program, ids)
    decoder = TorchDecoder(program)
    found = torch.cat(
        [decoder.advance(ids[0, :70].tolist()), decoder.advance(ids[0, 70:].tolist())]
    )
    assert (found - truth).norm() <= 4 * own
    decoder.rewind(0)
    assert (decoder.advance(ids[0].tolist(), last=20) - truth[-20:]).norm() <= 4 * own


def test_more_rows_than_the_program_gives_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cached("llama", "sdpa", 0)
    program = Pipeline([KeepLastLogits(count=2)]).run(whole)
    ids = cached_decoders.tokens(1, 12)[0].tolist()
    wanted = TorchDecoder(whole).advance(ids)
    decoder = TorchDecoder(program)
    for last, rows in ((1, 1), (2, 2)):
        decoder.rewind(0)
        found = decoder.advance(ids, last)
        assert found.shape[0] == rows
        assert (found - wanted[-rows:]).norm() <= 1e-5 * wanted.norm()
    monkeypatch.setattr(decode_torch, "ROOM", 5)
    for last in (None, 3, 1):
        decoder = TorchDecoder(program)
        found = decoder.advance(ids, last)
        assert found.shape[0] == (last or 12)
        assert (found - wanted[-(last or 12) :]).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_a_tree_gives_what_each_of_its_branches_gives(name: str, attention: zoo.Attention) -> None:
    decoder = TorchDecoder(cached(name, attention, 4))
    ids = cached_decoders.tokens(1, 40)[0].tolist()
    text, drafts = ids[:17], ids[17:27]
    parents = [-1, -1, 0, 0, 1, 2, 2, 5, 4, 7]
    branches = [[0], [1], [0, 2, 5, 7, 9], [0, 3], [1, 4, 8], [0, 2, 6]]
    alone: dict[int, Tensor] = {}
    for branch in branches:
        decoder.rewind(0)
        decoder.advance(text)
        rows = decoder.advance([drafts[i] for i in branch])
        alone |= dict(zip(branch, rows, strict=True))
    for count in (10, 7):  # by both plans
        decoder.rewind(0)
        decoder.advance(text)
        found = decoder.advance_tree(drafts[:count], parents[:count])
        for place in range(count):
            assert (found[place] - alone[place]).norm() <= 1e-5 * alone[place].norm()
        path = [0, 2, 5, 7, 9][: 5 if count == 10 else 3]
        decoder.keep_branch(path)
        assert decoder.length == 17 + len(path)
        following = decoder.advance(ids[30:32])
        decoder.rewind(17)
        wanted = decoder.advance([*(drafts[i] for i in path), *ids[30:32]])[-2:]
        assert (following - wanted).norm() <= 1e-5 * wanted.norm()
    with pytest.raises(WrongInput, match="not of the tree"):
        decoder.keep_branch([0])
    with pytest.raises(WrongInput, match="no tree of tokens"):
        decoder.advance_tree([3, 4], [-1, 1])


@pytest.mark.parametrize("few", [True, False])
def test_buffers_in_use_at_once_do_not_overlap(few: bool) -> None:
    plan = lower_plan(cached("gemma2", "eager", 0), few=few)
    begins, width = arrange(plan)
    first = [len(plan.steps)] * len(begins)
    for index, step in enumerate(plan.steps):
        operands = step.args if isinstance(step, Called) else (*step.inputs, step.out)
        for operand in operands:
            if hasattr(operand, "buffer"):
                first[operand.buffer] = min(first[operand.buffer], index)
                assert plan.last_use[operand.buffer] >= index or operand is step.out
    for a in range(len(begins)):
        assert begins[a] + plan.buffers[a] <= width
        for b in range(a):
            together = first[a] <= plan.last_use[b] and first[b] <= plan.last_use[a]
            apart = (
                begins[a] + plan.buffers[a] <= begins[b] or begins[b] + plan.buffers[b] <= begins[a]
            )
            assert apart or not together
    assert width < sum(plan.buffers) / 3, "rooms are shared"


def test_refusals() -> None:
    with pytest.raises(CannotDecode, match="has no KV cache"):
        TorchDecoder(cached_decoders.raised("llama"))
    decoder = TorchDecoder(cached("llama", "sdpa", 0))
    with pytest.raises(WrongInput, match="there are no tokens"):
        decoder.advance([])
    with pytest.raises(WrongInput, match="not of this vocabulary"):
        decoder.advance([3, zoo.VOCABULARY])
    with pytest.raises(WrongInput, match="can only become shorter"):
        decoder.rewind(1)
    decoder.context = 10
    decoder.advance([3] * 8)
    with pytest.raises(TextTooLong, match="longer than the model's context"):
        decoder.advance([3] * 3)
    assert decoder.length == 8
