"""How much rounding each weight costs the model's outputs: which layers need their bits.

For a small error D of a weight, the KL divergence of the model's next-token distribution grows by
half the Fisher information along it: KL = 1/2 E[(g_t D x_t)^2], where x_t is the weight's input at
token t and g_t the gradient of log p(y) by its output, for labels y drawn from the model itself
(Amari 1998, eq. 2). Two streamed passes measure it. One, forward and backward, keeps of each
product w_t = |g_t|^2 and the shares of its outputs in it; one, forward only, sums at each site
H = sum w_t x_t x_t^T and prices every candidate format there: 1/2 sum_r share_r (D H D^T)_rr.
For outputs that are no distribution the squared error, relative to the outputs' mean square, takes
the place of twice the KL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ir.encoded import Format
from .ir.errors import UnsupportedShape
from .ir.hessian import Hessian, damped, output_error
from .ir.interpret import run
from .ir.program import Node, Program
from .ir.weight_roles import weight_roles
from .passes.calibrate import Activations, Batches, Product, Site, sweep
from .passes.calibrated_weights import Problem
from .passes.quantize_gptq import QuantizeGptq

Progress = Callable[[int, int, str], None]
_DAMP = 0.01


@dataclass
class Pull:
    """How strongly the outputs depend on one product.

    tokens: w_t of each batch, float32 [tokens]; outputs: sum over tokens of g_t^2, [out].
    """

    tokens: list[Tensor] = field(default_factory=list[Tensor])
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))

    def shares(self) -> Tensor:
        """The part of each output, summing to one, [out]."""
        total = self.outputs.sum()
        return self.outputs / total if total > 0 else torch.zeros_like(self.outputs)


@dataclass(frozen=True)
class Pulls:
    """What the pass with gradients left: by product, and how many positions were judged."""

    products: dict[Node, Pull]
    positions: int


def measure_pulls(
    program: Program,
    batches: Batches,
    sites: Sequence[Site],
    progress: Progress = lambda done, total, what: None,
    seed: int = 0,
) -> Pulls:
    """Run every batch forward and backward; memory is one batch's activations and their gradients.

    Raises UnsupportedShape if no output is a floating-point tensor that depends on a product.
    """
    nodes = {product.node for site in sites for product in site.products}
    pulls = {node: Pull() for node in nodes}
    draw = torch.Generator().manual_seed(seed)
    positions = 0
    for number, batch in enumerate(batches):
        progress(number, len(batches), "gradients")

        def watch(node: Node, value: object) -> None:
            if node in nodes and isinstance(value, Tensor):
                value.requires_grad_()
                pulls[node].tokens.append(torch.zeros(value.shape[:-1].numel()))
                value.register_hook(_catcher(pulls[node]))  # type: ignore[no-untyped-call]

        outputs = run(
            program,
            batch,
            watch=watch,
            gradients=True,
            weight=lambda n: program.weights[n].detach(),
        )
        judged = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not judged:
            raise UnsupportedShape(
                "no output of the program depends on a matmul with a weight",
                expected="a floating-point output",
                fix="search is for models with linear layers",
            )
        rows = [output.flatten(0, -2).float() for output in judged]
        terms = [_objective(each, is_distribution(program, each), draw) for each in rows]
        torch.stack(terms).sum().backward()
        positions += rows[0].shape[0]
    progress(len(batches), len(batches), "gradients")
    return Pulls(pulls, positions)


def _catcher(pull: Pull) -> Callable[[Tensor], None]:
    """A hook that adds one batch's gradient [..., out]."""

    def catch(gradient: Tensor) -> None:
        squares = gradient.detach().float().square().flatten(0, -2)
        pull.tokens[-1] = squares.sum(-1)  # zeros where no output depends on the product
        pull.outputs = pull.outputs + squares.sum(0)

    return catch


def _objective(rows: Tensor, distribution: bool, draw: torch.Generator) -> Tensor:
    """Its squared gradient is, on average, the Fisher information of the outputs [rows, out]."""
    if distribution:
        logs = rows.log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=draw)
        return logs.gather(-1, drawn).sum()
    noise = torch.randn(rows.shape, generator=draw)
    return (
        rows * noise / rows.detach().square().sum(-1, keepdim=True).sqrt().clamp(min=1e-9)
    ).sum()


def is_distribution(program: Program, output: Tensor) -> bool:
    """Whether an output [..., out] is about words: as many as the largest looked-up table has."""
    tables = [int(role.value.shape[0]) for role in weight_roles(program) if role.tables]
    return bool(tables) and output.shape[-1] == max(tables)


Costs = dict[str, dict[str, float]]
"""Weight name to format name to predicted cost: nats a position, or half the relative error."""


def price(
    program: Program,
    batches: Batches,
    sites: Sequence[Site],
    pulls: Pulls,
    formats: Callable[[Product], Sequence[Format]],
    *,
    calibrated: Callable[[Format], bool],
    progress: Progress = lambda done, total, what: None,
    known: Costs | None = None,
    found: Callable[[Costs], None] = lambda costs: None,
) -> Costs:
    """What every candidate format costs every weight.

    formats: the candidates of a product. calibrated: of a format, whether to price it as GPTQ
    rounds to it; the others are rounded to nearest, and their price is lowered as much as that of
    the calibrated format of the nearest size was by GPTQ. known: prices from an interrupted run;
    found: is told all prices after every site.
    """
    costs: Costs = dict(known or {})
    left = [site for site in sites if any(p.weight not in costs for p in site.products)]

    def visit(site: Site, activations: Activations) -> None:
        plain = Hessian(site.width)
        for rows in activations:
            plain.add(rows)
        hessian, _ = damped(plain.mean(), _DAMP)
        for product in site.products:
            felt = _felt(site, product, activations, pulls)
            shares = pulls.products[product.node].shares()
            prices = _prices(program, product, felt, shares, hessian, formats(product), calibrated)
            before = costs.get(product.weight, {})
            costs[product.weight] = {n: before.get(n, 0.0) + c for n, c in prices.items()}
        found(costs)

    if left:
        sweep(program, batches, visit, sites=left, progress=progress)
    return costs


def _felt(site: Site, product: Product, activations: Activations, pulls: Pulls) -> Tensor:
    """H of the product: its inputs' second moments, weighted by what the outputs feel, [in, in]."""
    felt = Hessian(site.width)
    for rows, weights in zip(activations, pulls.products[product.node].tokens, strict=True):
        felt.add(rows.float() * weights.sqrt().unsqueeze(1))
    return felt.mean() * (felt.tokens / max(pulls.positions, 1))


def _prices(
    program: Program,
    product: Product,
    felt: Tensor,
    shares: Tensor,
    hessian: Tensor,
    formats: Sequence[Format],
    calibrated: Callable[[Format], bool],
) -> dict[str, float]:
    weight = program.weights[product.weight]
    rows = weight.movedim(product.axis, -1).float()

    def cost(values: Tensor) -> float:
        return 0.5 * float((output_error(values - rows, felt) * shares).sum())

    prices: dict[str, float] = {}
    bits: dict[str, float] = {}
    gains: dict[str, float] = {}
    for fmt in formats:
        encoded = fmt.encode(weight, product.axis, where=product.weight)
        prices[fmt.name] = cost(encoded.decode().movedim(product.axis, -1).float())
        bits[fmt.name] = encoded.bits_per_weight()
        if calibrated(fmt):
            problem = Problem(rows, hessian, fmt, weight.dtype, product.weight)
            solved = cost(QuantizeGptq(format=fmt.name, sweeps=0).solve(problem).values)
            gains[fmt.name] = solved / max(prices[fmt.name], 1e-30)
    if not gains:
        return prices
    nearest = {n: min(gains, key=lambda g: abs(bits[g] - bits[n])) for n in prices}
    return {n: price * gains[nearest[n]] for n, price in prices.items()}


__all__ = ["Costs", "Progress", "Pull", "Pulls", "is_distribution", "measure_pulls", "price"]
