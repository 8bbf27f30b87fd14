"""Choose the format of every layer under a budget of bits, or of quality; the result is a recipe.

The steps: what rounding each weight in each candidate format costs the outputs
(`search_sensitivity`), the best allocation under the budget (`search_allocate`), and the base
recipe with that allocation as overrides. The bits counted are those of all weights that matmuls
read, scales and zero points included; tables, and heads tied to them, stay as the recipe has them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ir.encoded import Format
from .ir.errors import CalibrationTooSmall, UnsupportedFormat, WrongOption
from .ir.formats import parse_format
from .ir.program import Program
from .ir.weight_roles import weight_roles
from .passes.calibrate import Batches, Product, Site, check_batches, product_sites
from .passes.catalog import find_pass
from .passes.judge import quiet
from .passes.weight_plan import WeightQuantizer
from .recipes import Recipe, Step, find_recipe
from .search_allocate import Allocation, BudgetTooSmall, Choices, allocate, cheapest_within
from .search_measure import divergence
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
_GRID_OPTIONS = ("bits", "group_size", "symmetric", "scale_dtype", "format", "overrides")
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
class Class:
    """Weights that get one format: their names, how many values, and the candidates."""

    names: tuple[str, ...]
    count: int
    formats: tuple[str, ...]
    choices: Choices


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
    base, step = _base(wish.base)
    used, kept = _split(batches, wish.held_out)
    state = State(folder, program, used, (wish.formats, wish.gradients, step))
    costs = _costs(program, used, wish, step in _CALIBRATED, state, progress)
    classes = _classes(program, costs, wish)
    total = sum(each.count for each in classes)
    choices = [each.choices for each in classes]
    uniform = _uniform(classes, wish.formats)
    if wish.bits is not None:
        allocation = _within_bits(choices, wish.bits, total)
        recipe = _recipe(base, step, classes, allocation, f"{wish.bits:g} bits a weight")
        change = divergence(program, recipe, used, kept, progress) if kept else None
    else:
        assert wish.kl is not None
        allocation, recipe, change = _within_kl(
            program, base, step, classes, wish.kl, used, kept, progress
        )
    formats = _named(classes, allocation)
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


def _base(name: str) -> tuple[Recipe, str]:
    """The base recipe and the name of its quantizing step; raises WrongOption."""
    recipe = find_recipe(name)
    found = [s.name for s in recipe.steps if isinstance(find_pass(s.name)(), WeightQuantizer)]
    if len(found) != 1:
        raise WrongOption(
            f"the recipe {recipe.name} has {len(found) or 'no'} steps that quantize weights",
            expected="one",
            fix="use --recipe gptq4 or rtn4",
        )
    return recipe, found[0]


def _costs(
    program: Program,
    batches: Batches,
    wish: Wish,
    calibrated: bool,
    state: State,
    progress: Progress,
) -> Costs:
    sites = _sites(program)
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
        lambda product: _fitting(program, product, parsed),
        calibrated=_reference(parsed) if calibrated else lambda fmt: False,
        progress=progress,
        known=known,
        found=state.write,
    )


def _sites(program: Program) -> list[Site]:
    """The sites of weights that the base's quantizer takes: no tables, one axis."""
    plain = {
        role.name
        for role in weight_roles(program)
        if role.matmuls and not role.tables and not role.others
    }
    sites = [
        Site(site.value, tuple(p for p in site.products if p.weight in plain))
        for site in product_sites(program)
    ]
    return [site for site in sites if site.products]


def _fitting(program: Program, product: Product, formats: Sequence[Format]) -> list[Format]:
    """The candidates whose groups divide the weight's width."""
    width = program.weights.shape(product.weight)[product.axis]
    found = [fmt for fmt in formats if width % fmt.grouping(width) == 0]
    if not found:
        raise UnsupportedFormat(
            f"no candidate's groups divide the {width} inputs of {product.weight}",
            where=product.weight,
            expected=f"a group size that divides {width}",
            found=", ".join(fmt.name for fmt in formats),
            fix="add a candidate such as int4-channel-asym-f16 with --formats",
        )
    return found


def _reference(formats: Sequence[Format]) -> Callable[[Format], bool]:
    """Price only the candidate nearest to 4 bits by GPTQ: its gain hardly depends on the width."""
    shape = (64, 1 << 13)
    nearest = min(formats, key=lambda fmt: abs(fmt.bits_per_weight(shape, -1) - 4))
    return lambda fmt: fmt == nearest


def _classes(program: Program, costs: Costs, wish: Wish) -> list[Class]:
    axes = {p.weight: p.axis for site in _sites(program) for p in site.products}
    groups: dict[str, tuple[str, ...]] = {}
    for site in _sites(program):
        names = tuple(dict.fromkeys(product.weight for product in site.products))
        for unit in [names] if wish.together else [(name,) for name in names]:
            fresh = tuple(name for name in unit if name not in groups)
            groups |= dict.fromkeys(fresh, fresh)
    classes: list[Class] = []
    for names in dict.fromkeys(groups.values()):
        formats = [n for n in wish.formats if all(n in costs[name] for name in names)]
        counts = [program.weights.shape(name).numel() for name in names]
        sizes = [
            sum(
                count * parse_format(fmt).bits_per_weight(program.weights.shape(name), axes[name])
                for name, count in zip(names, counts, strict=True)
            )
            for fmt in formats
        ]
        prices = [sum(costs[name][fmt] for name in names) for fmt in formats]
        classes.append(Class(names, sum(counts), tuple(formats), Choices(sizes, prices)))
    return classes


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
        recipe = _recipe(base, step, classes, allocation, f"KL {kl:g}")
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


def _named(classes: Sequence[Class], allocation: Allocation) -> dict[str, str]:
    """Weight name to format name."""
    return {
        name: each.formats[place]
        for each, place in zip(classes, allocation.chosen, strict=True)
        for name in each.names
    }


def _recipe(
    base: Recipe, step: str, classes: Sequence[Class], allocation: Allocation, wish: str
) -> Recipe:
    """The base recipe with the allocation: the most frequent format, and overrides of it."""
    formats = _named(classes, allocation)
    usual = Counter(formats.values()).most_common(1)[0][0]
    special = "; ".join(f"{n}={f}" for n, f in formats.items() if f != usual)
    steps: list[Step] = []
    for each in base.steps:
        if each.name == step:
            options = {n: v for n, v in each.options if n not in _GRID_OPTIONS}
            changed = options | {"format": usual} | ({"overrides": special} if special else {})
            each = dataclasses.replace(each, options=tuple(changed.items()))
        steps.append(each)
    description = f"{base.description}; formats by layer, searched for {wish}"
    return Recipe(f"{base.name}-searched", description, tuple(steps))


def _uniform(classes: Sequence[Class], formats: Sequence[str]) -> list[tuple[str, float, float]]:
    """What one format for all weights would take and cost, where it fits them all."""
    total = sum(each.count for each in classes)
    found: list[tuple[str, float, float]] = []
    for name in formats:
        if all(name in each.formats for each in classes):
            places = [each.formats.index(name) for each in classes]
            pairs = list(zip(classes, places, strict=True))
            size = sum(each.choices.sizes[i] for each, i in pairs) / total
            found.append((name, size, sum(each.choices.costs[i] for each, i in pairs)))
    return found


__all__ = ["FORMATS", "BudgetTooSmall", "Class", "Found", "Wish", "search"]
