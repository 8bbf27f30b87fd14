"""What others published of kernels of these kinds, to set beside our bounds.

Their measurements on their machines, each with where it was read; none of them is of planish.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Record:
    """kinds: words of our kernels' names that it is about."""

    kinds: tuple[str, ...]
    what: str
    gpu: str
    figure: str
    source: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


RECORDS = (
    Record(
        ("attention",),
        "FlashAttention-2, forward",
        "A100",
        "50-73 % of peak; training at 225 TFLOP/s",
        "a review of Dao 2023 (arXiv 2307.08691); the project's README",
    ),
    Record(
        ("attention",),
        "FlashAttention-2 / FlashAttention-3, forward",
        "H100",
        "35 % of peak / 740 TFLOP/s in fp16 (75 %), near 1,200 in fp8",
        "abstract of Shah et al. 2024 (FlashAttention-3)",
    ),
    Record(
        ("attention",),
        "FlashAttention-4, forward",
        "B200",
        "about 1,600 TFLOP/s",
        "a post of its author",
    ),
    Record(
        ("attention",),
        "Triton's tutorial 06, causal, fp16, heads of 64, 1k to 16k tokens",
        "not named there",
        "112-164 TFLOP/s",
        "triton-lang.org",
    ),
    Record(
        ("attention",),
        "FlexAttention, forward",
        "A100",
        "90 % of FlashAttention-2",
        "PyTorch blog, 2024-08-07",
    ),
    Record(
        ("int4", "int3", "codebook", "packed"),
        "Marlin, int4 in groups of 128, up to 16-32 rows",
        "A10",
        "3.87 times fp16",
        "the project's README",
    ),
    Record(
        ("int4", "int3", "codebook", "packed"),
        "Machete, int4",
        "H100",
        "as fast as fp16 where arithmetic binds",
        "copies of the post of its authors",
    ),
)


def records_for(kernel: str) -> list[Record]:
    """Those about kernels of such a name."""
    return [record for record in RECORDS if any(kind in kernel for kind in record.kinds)]
