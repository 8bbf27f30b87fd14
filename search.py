"""Choose the format of every layer under a budget of bits, or of quality; the result is a recipe.

The steps: what rounding each weight in each candidate format costs the outputs
(`search_sensitivity`), the best allocation under the budget (`search_allocate`), and the base
recipe with that allocation as overrides. The bits counted are those of all weights that matmuls
read, scales and zero points included; tables, and heads tied to them, stay as the recipe has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ir.encoded import Format
from .ir.errors import CalibrationTooSmall, WrongOption
from .ir.formats import parse_format
from .ir.program import Program
from .passes.calibrate import Batches, check_batches
from .passes.judge import quiet
from .recipes import Recipe
from .search_allocate import Allocation, BudgetTooSmall, Choices, allocate, cheapest_within
from .search_classes import Class, fitting_formats, group_weights, plain_sites, uniform_points
from .search_measure import divergence
from .search_recipe import allocated_recipe, base_recipe, chosen_formats
from .search_sensitivity import Costs, Progress, measure_pulls, price
from .search_state import State

FORMATS = (
    "int2-g32-asym-f16",
    "int3-g32-asym-f16",
    "int3-g64-asym-f16",
    "int4-g32-asym-f16",
    "int4-g64-asym-f16",
    "int4-g128-asym-f16",
    "int5-g64-asym-f16",
    "int6-g64-asym-f16",
    "int8-g64-sym-f16",
)
_CALIBRATED = ("quantize_gptq", "quantize_rounding", "quantize_obq")
_TRIES = 5


@dataclass(frozen=True)
class Wish:
    """What is searched for.

    bits: the most bits a weight may take on average; or kl: the most the outputs may change, in
    nats a position (of outputs that are no distribution: half their relative squared error).
    formats: the candidates. base: the recipe whose quantizing step gets the result. together: the
    products of one value (q, k and v; gate and up) share a format, so that they can be fused.
    gradients: how many batches the pass with gradients takes. held_out: how many of the last
    batches only measure the result.
    """

    bits: float | None = None
    kl: float | None = None
    formats: tuple[str, ...] = FORMATS
    base: str = "gptq4"
    together: bool = True
    gradients: int = 16
    held_out: int = 4

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.kl is None):
            raise WrongOption(
                "a search needs one budget: of bits or of KL",
                expected="bits=4.5 or kl=0.02",
                found=f"bits={self.bits}, kl={self.kl}",
                fix="give one of --budget-bits and --max-kl",
            )
        if not (self.bits or self.kl or 0) > 0:
            raise WrongOption(
                "a budget must be a positive number",
                found=str(self.bits if self.kl is None else self.kl),
                fix="for example --budget-bits 4.5",
            )


@dataclass(frozen=True)
class Found:
    """The result. bits: a weight on average; predicted, measured: the change of the outputs.

    measured is None if no batch was held out. uniform: (format, bits, predicted) of one format for
    all weights.
    """

    recipe: Recipe
    formats: Mapping[str, str]
    bits: float
    predicted: float
    measured: float | None
    exact: bool
    classes: Sequence[Class]
    uniform: Sequence[tuple[str, float, float]]


def search(
    program: Program,
    batches: Batches,
    wish: Wish,
    *,
    folder: Path | None = None,
    progress: Progress = quiet,
) -> Found:
    """Search a recipe for a program as it was captured.

    batches: calibration, flat input lists. folder: keeps what was measured, so that an interrupted
    search, or one for another budget, goes on from there. Raises BudgetTooSmall (which says the
    least), CalibrationTooSmall and those of the passes.
    """
    check_batches(program, batches)
    base, step = base_recipe(wish.base)
    used, kept = _split(batches, wish.held_out)
    state = State(folder, program, used, (wish.formats, wish.gradients, step))
    costs = _costs(program, used, wish, step in _CALIBRATED, state, progress)
    classes = group_weights(program, costs, wish.formats, wish.together)
    total = sum(each.count for each in classes)
    choices = [each.choices for each in classes]
    uniform = uniform_points(classes, wish.formats)
    if wish.bits is not None:
        allocation = _within_bits(choices, wish.bits, total)
        recipe = allocated_recipe(base, step, classes, allocation, f"{wish.bits:g} bits a weight")
        change = divergence(program, recipe, used, kept, progress) if kept else None
    else:
        assert wish.kl is not None
        allocation, recipe, change = _within_kl(
            program, base, step, classes, wish.kl, used, kept, progress
        )
    formats = chosen_formats(classes, allocation)
    return Found(
        recipe,
        formats,
        allocation.size / total,
        allocation.cost,
        change,
        allocation.exact,
        classes,
        uniform,
    )


def _split(batches: Batches, held_out: int) -> tuple[Batches, Batches]:
    if held_out and len(batches) <= held_out:
        raise CalibrationTooSmall(
            "too few calibration batches to hold some out",
            expected=f"more than {held_out}",
            found=str(len(batches)),
            fix="give more text, or --held-out 0",
        )
    return (batches[:-held_out], batches[-held_out:]) if held_out else (batches, [])


def _costs(
    program: Program,
    batches: Batches,
    wish: Wish,
    calibrated: bool,
    state: State,
    progress: Progress,
) -> Costs:
    sites = plain_sites(program)
    known = state.read()
    if all(product.weight in known for site in sites for product in site.products):
        return known
    pulls = measure_pulls(program, batches[: wish.gradients], sites, progress)
    parsed = [parse_format(name) for name in wish.formats]
    return price(
        program,
        batches[: wish.gradients],
        sites,
        pulls,
        lambda product: fitting_formats(program, product, parsed),
        calibrated=_reference(parsed) if calibrated else lambda fmt: False,
        progress=progress,
        known=known,
        found=state.write,
    )


def _reference(formats: Sequence[Format]) -> Callable[[Format], bool]:
    """Price only the candidate nearest to 4 bits by GPTQ: its gain hardly depends on the width."""
    shape = (64, 1 << 13)
    nearest = min(formats, key=lambda fmt: abs(fmt.bits_per_weight(shape, -1) - 4))
    return lambda fmt: fmt == nearest


def _within_bits(choices: Sequence[Choices], bits: float, total: int) -> Allocation:
    least = sum(min(each.sizes) for each in choices) / total
    if bits < least:
        raise BudgetTooSmall(
            f"{bits:g} bits a weight are less than the smallest candidates take",
            expected=f"at least {least:.2f}",
            found=f"{bits:g}",
            fix="raise --budget-bits, or add smaller candidates with --formats",
        )
    return allocate(choices, bits * total)


def _within_kl(
    program: Program,
    base: Recipe,
    step: str,
    classes: Sequence[Class],
    kl: float,
    used: Batches,
    kept: Batches,
    progress: Progress,
) -> tuple[Allocation, Recipe, float | None]:
    """The smallest whose predicted change is at most kl; measured, the prediction is corrected."""
    choices = [each.choices for each in classes]
    least = sum(min(each.costs) for each in choices)
    if kl < least:
        raise BudgetTooSmall(
            f"the largest candidates are predicted to change the outputs by more than {kl:g}",
            expected=f"at least {least:.3g}",
            found=f"{kl:g}",
            fix="raise --max-kl, or add finer candidates with --formats",
        )
    aim, change, best = kl, 0.0, None
    for _ in range(_TRIES):
        allocation = cheapest_within(choices, max(aim, least))
        recipe = allocated_recipe(base, step, classes, allocation, f"KL {kl:g}")
        if not kept:
            return allocation, recipe, None
        change = divergence(program, recipe, used, kept, progress)
        if change <= kl and (best is None or allocation.size < best[0].size):
            best = allocation, recipe, change
        if 0.85 * kl <= change <= kl:
            break
        aim = aim * kl / max(change, 1e-12) * 0.93
    if best is None:
        raise BudgetTooSmall(
            f"no allocation was found that keeps the measured change at {kl:g}",
            found=f"{change:.3g} for the last one tried",
            fix="raise --max-kl, or add finer candidates with --formats",
        )
    return best


__all__ = ["FORMATS", "BudgetTooSmall", "Class", "Found", "Wish", "search"]
