"""quantize_kv_cache: the codecs, and int8 and KIVI caches against their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cached_decoders import cached, gap, raised, tokens, with_cache
from captured import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_caches import Int8Cache, KiviCache, PaperCache, run_pieces
from planish.ir.capture import capture_module
from planish.ir.errors import PlanishError, UnsupportedGroupSize, WrongOption
from planish.ir.interpret import run
from planish.ir.layouts import BitPacked
from planish.ir.program_folder import load_program, save_program
from planish.passes.cached_attention import CacheRefused
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.measure_cache import run_in_pieces
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_kv_cache import QuantizeKvCache
from planish.recipes import pipeline
from torch import Tensor

OPS = torch.ops.planish
BITS = st.sampled_from([2, 4, 8])


def grid(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor]:
    zero = x.amin(axis, keepdim=True)
    return (x.amax(axis, keepdim=True) - zero) / (2**bits - 1), zero


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """[2, tokens, width] of some magnitude, some of it constant or zero."""
    sizes = (2, draw(st.integers(1, 6)), draw(st.integers(1, 11)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(sizes, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    x[0, 0] = draw(st.sampled_from([0.0, 1.5, -3.0]))
    return x + draw(st.sampled_from([0.0, 2.0, -50.0]))


@settings(max_examples=60, deadline=None)
@given(values(), BITS, st.sampled_from([1, 2]))
def test_asymmetric_codes_are_nearest_on_their_grid(x: Tensor, bits: int, axis: int) -> None:
    scale, zero = grid(x, bits, axis)
    codes = OPS.quantize_cache(x, scale, zero, bits)
    width = x.shape[-1]
    assert codes.dtype == torch.uint8 and codes.shape[-1] == math.ceil(width * bits / 8)
    back = OPS.dequantize_cache(codes, scale, zero, bits, width=width)
    # Half a step, and the float32 roundings of difference, quotient, product and sum.
    rounding = 4 * torch.finfo(torch.float32).eps * (x.abs() + zero.abs() + 255 * scale)
    assert bool(((x - back).abs() <= scale / 2 + rounding).all())
    constant = (scale == 0).expand_as(x)
    assert torch.equal(back[constant], x[constant])
    assert bool(((back - x).abs() <= rounding)[(x == zero).expand_as(x)].all())
    loose = BitPacked(bits).unpack(codes, width)
    assert torch.equal(BitPacked(bits).pack(loose), codes)
    assert int(loose.max()) < 2**bits


@settings(max_examples=60, deadline=None)
@given(values())
def test_symmetric_codes_are_nearest_and_stay_when_coded_again(x: Tensor) -> None:
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = OPS.quantize_cache(x, scale)
    back = OPS.dequantize_cache(codes, scale, width=x.shape[-1])
    eps = torch.finfo(torch.float32).eps
    assert bool(((x - back).abs() <= scale / 2 + 4 * eps * x.abs()).all())
    assert torch.equal(OPS.quantize_cache(back, scale), codes)
    assert codes.dtype == torch.int8 and int(codes.to(torch.int64).abs().max()) <= 127


CASES = [
    ("llama", "sdpa", "int8"),
    ("gemma2", "eager", "int8"),
    ("llama", "sdpa", "kivi2"),
    ("gpt2", "sdpa", "kivi4"),
]


def model_of(name: str, attention: str) -> torch.nn.Module:
    """A copy, because the reference gives it another attention."""
    return copy.deepcopy(sample(name, attention).model)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "attention", "form"), CASES)
def test_it_computes_what_the_definition_says(name: str, attention: str, form: str) -> None:
    """In float32, where the reference differs from the program by rounding alone."""
    head = cached(name, attention).inputs[-1].meta["val"].shape[3]  # type: ignore[arg-type]
    group = 5 if head == 10 else 4
    bits = {"int8": 8, "kivi4": 4, "kivi2": 2}[form]
    step = QuantizeKvCache(bits, group, 2 * group)
    program = with_cache(name, attention, step)  # type: ignore[arg-type]
    ids, cuts = tokens(2, 38), [3, 24, *range(25, 39)]
    reference = Int8Cache() if bits == 8 else KiviCache(bits=bits, group=group, residual=2 * group)
    wanted = run_pieces(model_of(name, attention), reference, ids, cuts)
    exact = run_pieces(model_of(name, attention), PaperCache(), ids, cuts)
    assert gap(run_in_pieces(cached(name, attention), [ids], cuts), exact) < 1e-5  # type: ignore[arg-type]
    assert gap(run_in_pieces(program, [ids], cuts), wanted) < 1e-5
    assert gap(exact, wanted) > 1e-3


def test_int8_is_the_same_in_whatever_pieces_and_batches_the_text_comes() -> None:
    program = with_cache("llama", "sdpa", QuantizeKvCache())
    ids = tokens(3, 14)
    whole = run_in_pieces(program, [ids], [14], float64=True)
    for cuts in (list(range(1, 15)), [5, 6, 11, 14]):
        assert gap(run_in_pieces(program, [ids], cuts, float64=True), whole) < 1e-12
    alone = run_in_pieces(program, [ids[1:2]], [14], float64=True)
    assert gap(whole[1:2], alone) < 1e-12


def test_old_codes_pass_through_untouched() -> None:
    for step, kept in ((QuantizeKvCache(), (2,) * 4), (QuantizeKvCache(2, 5, 10), (2, 2, 2, 9))):
        program = with_cache("llama", "sdpa", step)
        ids = tokens(2, 13)
        _, *past = run(program, [ids[:, :12], *empty_past(program, 2)])
        _, *present = run(program, [ids[:, 12:], *past])
        names = [n.name for n in program.inputs[1:]]
        for name, old, new, axis in zip(names, past, present, kept * 4, strict=False):
            if axis != 9 and "recent" not in name:
                assert torch.equal(new[:, :, : old.shape[2]], old), name


def test_it_is_called_with_codes_and_scales() -> None:
    program = with_cache("llama", "sdpa", QuantizeKvCache())
    ids = tokens(2, 6)
    flat = empty_past(program, 2)
    past = tuple(((a, b), (c, d)) for a, b, c, d in (flat[:4], flat[4:]))
    result, present = program(input_ids=ids, past=past)
    assert result.logits.shape == (2, 6, 97)
    (codes, scale), (value_codes, _) = present[1]
    assert codes.dtype == value_codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert codes.shape == (2, 2, 6, 10) and scale.shape == (2, 2, 6, 1)
    again, _ = program(input_ids=ids[:, :1], past=present)
    assert again.logits.shape == (2, 1, 97)
    assert program.metadata["cache"]["codec"] == {"name": "int8"}
    assert program.metadata["cache"]["form"] == "growing"


def test_kivi_keeps_groups_and_the_latest() -> None:
    program = with_cache("llama", "sdpa", QuantizeKvCache(2, 5, 10))
    _, *present = run(program, [tokens(2, 27), *empty_past(program, 2)])
    shapes = [tuple(part.shape) for part in present[:8]]
    assert shapes == [
        *((2, 2, 4, 5, 3), (2, 2, 4, 1, 10), (2, 2, 4, 1, 10), (2, 2, 7, 10)),
        *((2, 2, 17, 2, 2), (2, 2, 17, 2, 1), (2, 2, 17, 2, 1), (2, 2, 10, 10)),
    ]
    assert program.metadata["cache"]["rewind"] is False


def test_more_bits_lose_less_and_the_history_says_so() -> None:
    steps = [QuantizeKvCache(2, 5, 10), QuantizeKvCache(4, 5, 10), QuantizeKvCache()]
    records = [with_cache("llama", "sdpa", s).history.records[-1] for s in steps]
    ratios = [record.measured[0].after for record in records]
    assert ratios[0] < ratios[1] < ratios[2] < records[0].measured[0].before
    assert "SQNR of the first result (dB)" in records[0].line()


def test_a_half_precision_model_keeps_float32_scales() -> None:
    """What it loses is at most its own rounding and what the float32 model loses."""
    model = model_of("llama", "sdpa").bfloat16()
    plain = capture_module(model, (), {"input_ids": tokens(2, 12)})
    whole = Pipeline([InsertKvCache()]).run(pipeline("raise").run(plain))
    ids, cuts = tokens(2, 24), [14, 19, 24]
    for step in (QuantizeKvCache(), QuantizeKvCache(4, 5, 10)):
        program = Pipeline([step]).run(whole)
        kinds = {spec.name: spec.dtype for spec in program.input_specs}
        assert kinds["past_key_scale_1"] == torch.float32
        assert kinds.get("past_value_recent_1", torch.bfloat16) == torch.bfloat16
        exact = run_in_pieces(whole, [ids], cuts, float64=True)
        own = gap(run_in_pieces(whole, [ids], cuts), exact)
        wide = run_in_pieces(cached("llama"), [ids], cuts)
        lost = gap(run_in_pieces(with_cache("llama", "sdpa", step), [ids], cuts), wide)
        assert gap(run_in_pieces(program, [ids], cuts), exact) < 2 * (own + lost)


def test_a_saved_program_is_the_same(tmp_path: object) -> None:
    for step in (QuantizeKvCache(), QuantizeKvCache(2, 5, 10)):
        program = with_cache("llama", "sdpa", step)
        folder = tmp_path / step.spelling()  # type: ignore[operator]
        save_program(program, folder)
        again = load_program(folder)
        ids = tokens(2, 17, seed=3)
        wanted = run_in_pieces(program, [ids], [9, 11, 17])
        assert torch.equal(run_in_pieces(again, [ids], [9, 11, 17]), wanted)
        assert again.metadata["cache"] == program.metadata["cache"]


def test_refusals_are_one_sentence() -> None:
    def refusal(program: object, *steps: QuantizeKvCache) -> PlanishError:
        with pytest.raises(PlanishError) as caught:
            Pipeline(list(steps)).run(program)  # type: ignore[arg-type]
        return caught.value

    no_cache = refusal(raised("llama"), QuantizeKvCache())
    assert "requires 'cached'" in no_cache.what
    twice = refusal(cached("llama"), QuantizeKvCache(), QuantizeKvCache())
    assert isinstance(twice, CacheRefused)
    assert "%past_key_0 is not joined with new keys, read by one attention" in twice.what
    width = refusal(cached("llama"), QuantizeKvCache(4, 4, 8))
    assert isinstance(width, UnsupportedGroupSize)
    assert width.what == "groups of 4 do not divide the 10 channels of %past_value_0"
    assert "group_size=2 or 5 or 10" in width.fix
    for wrong in ({"bits": 3}, {"group_size": 0}, {"group_size": 32, "residual": 48}):
        with pytest.raises(WrongOption, match="option quantize_kv_cache"):
            QuantizeKvCache(**wrong)
