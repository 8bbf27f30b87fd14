"""Cut an encoder-decoder in two: the encoder runs once, the decoder at every token.

Before: one program (source, text) -> logits. After, `cut_encoder{keep=encoder}`: source -> (the
encoder's own results, {"cross": ((key, value), ...), ...}), a pair [batch, kv_heads, source, head]
for each cross attention, and what else the decoder reads of the encoder, such as `cross_mask`,
which hides the source's padding. `cut_encoder{keep=decoder}`: text and these keywords -> the other
results, with inputs `cross_key_0`, `cross_value_0`, ... after the decoder's own:

    result, cross = encoder(input_ids=source)
    logits = decoder(decoder_input_ids=text, **cross)["logits"]

Equal because both compute the same operations on the same values: the cross keys and values of
Vaswani et al. 2017, section 3.2.3, are made of the source alone. The pass runs both halves on the
example inputs in float64 and refuses if they differ from the whole. `insert_kv_cache` then gives
the decoder the cache of its self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ir.errors import WrongOption
from ..ir.interpret import run
from ..ir.program import Program
from .contract import Context, Pass, contract
from .cut_encoder_flow import CannotCut
from .cut_encoder_parts import Half, make_decoder, make_encoder
from .pipeline import Pipeline

_PARTS = ("decoder", "encoder")


@dataclass(frozen=True)
class CutEncoder(Pass):
    """Keep the decoder, or the encoder, of an encoder-decoder.

    keep: "decoder" or "encoder".
    """

    keep: str = "decoder"

    contract = contract("exact", requires=["raised", "no_dead_values"], changes_interface=True)

    def __post_init__(self) -> None:
        if self.keep not in _PARTS:
            raise WrongOption(
                f"option cut_encoder.keep cannot be {self.keep!r}",
                expected=" or ".join(_PARTS),
                found=repr(self.keep),
            )

    def run(self, program: Program, context: Context) -> None:
        whole, other = program.copy(), program.copy()
        if not context.journal.offers():
            return
        encoder, decoder = (program, other) if self.keep == "encoder" else (other, program)
        own, text = make_encoder(encoder), make_decoder(decoder)
        context.journal.noted(self.pass_name(), program.output, f"the {self.keep} alone")
        if whole.examples:
            _set_examples(whole, encoder, own, decoder, text)
            _check_against(whole, encoder, own, decoder, text)


def split_encoder(program: Program) -> tuple[Program, Program]:
    """The encoder and the decoder of a raised encoder-decoder; raises CannotCut."""
    encoder, decoder = (
        Pipeline([CutEncoder(keep=part)]).run(program) for part in ("encoder", "decoder")
    )
    return encoder, decoder


def _set_examples(
    whole: Program, encoder: Program, own: Half, decoder: Program, text: Half
) -> None:
    encoder.examples = tuple(whole.examples[place] for place in own.inputs)
    crossing = run(encoder, encoder.examples)[len(own.results) :]
    decoder.examples = (*(whole.examples[place] for place in text.inputs), *crossing)


def _check_against(
    whole: Program, encoder: Program, own: Half, decoder: Program, text: Half
) -> None:
    """Run the examples whole and in two halves, in float64; raise CannotCut if they differ."""
    wanted = run(whole, whole.examples, float64=True)
    first = run(encoder, encoder.examples, float64=True)
    given = [whole.examples[place] for place in text.inputs]
    second = run(decoder, [*given, *first[len(own.results) :]], float64=True)
    found = dict(zip(own.results, first, strict=False)) | dict(
        zip(text.results, second, strict=True)
    )
    for place, value in enumerate(wanted):
        if isinstance(value, Tensor) and not _equal(value, found[place]):
            raise CannotCut(
                "encoder and decoder together do not compute what the whole program computes",
                where=f"result {place}",
                expected="equal float64 runs on the example inputs",
                found=f"differing values of shape {list(value.shape)}",
                fix="decode with the whole program",
            )


def _equal(wanted: Tensor, found: Any) -> bool:
    """To rounding: a matmul may add its terms in another order where memory lies otherwise."""
    gap, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return bool(found.shape == wanted.shape and gap <= 1e-12 * size)
