"""calibrate: the sites of a graph, the sweep over it, and what bad calibration is told."""

from __future__ import annotations

import pytest
import torch
import zoo
from captured import captured
from planish.ir.capture import capture_module
from planish.ir.errors import CalibrationTooSmall, NonFiniteActivation, WrongInput
from planish.ir.interpret import run
from planish.ir.program import Node, Program
from planish.passes.calibrate import Activations, Site, observe, product_sites, sweep
from planish.passes.calibration_stream import Stream, schedule
from torch import Tensor, nn


class Shared(nn.Module):
    """Three products read one value, one of them through a reshape; a fourth is transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(11, 6)
        self.q, self.k = nn.Linear(6, 10), nn.Linear(6, 4, bias=False)
        self.v = nn.Parameter(torch.randn(6, 5))
        self.last = nn.Parameter(torch.randn(7, 10))
        self.unread = nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        rows = x.reshape(-1, 6) @ self.v
        mixed = self.q(x) + self.k(x).sum(-1, keepdim=True) + rows.sum()
        return self.unread(torch.tanh(mixed) @ self.last.t())


def shared() -> Program:
    return capture_module(Shared().eval(), (torch.arange(6).reshape(2, 3),))


def batches(count: int, length: int = 3) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(5)
    return [[torch.randint(0, 11, (2, length), generator=made)] for _ in range(count)]


def spelled(sites: list[Site]) -> list[tuple[str, list[tuple[str, int]]]]:
    return [(s.value.name, [(p.weight, p.axis) for p in s.products]) for s in sites]


def test_products_that_read_one_value_share_a_site() -> None:
    assert spelled(product_sites(shared())) == [
        ("embedding", [("v", -2), ("q.weight", -1), ("k.weight", -1)]),
        ("tanh", [("last", -1)]),
        ("matmul_1", [("unread.weight", -1)]),
    ]


def recorded(program: Program, flat: list[Tensor]) -> dict[Node, Tensor]:
    seen: dict[Node, Tensor] = {}
    run(program, flat, watch=seen.__setitem__)
    return seen


def test_a_sweep_shows_what_a_run_computes() -> None:
    program, given = shared(), batches(3)
    wanted = [recorded(program, flat) for flat in given]
    visited: list[Site] = []

    def visit(site: Site, activations: Activations) -> None:
        visited.append(site)
        for _ in range(2):  # they may be iterated again
            for values, rows in zip(wanted, activations, strict=True):
                assert torch.equal(rows, values[site.value].reshape(-1, site.width))
        assert activations.tokens == 18
        assert len(activations) == 3

    sweep(program, given, visit)
    assert visited == product_sites(program)


def test_later_sites_run_on_the_weights_that_a_visit_left() -> None:
    program, given = shared(), batches(2)
    doubled = program.copy()
    doubled.weights["q.weight"] = program.weights["q.weight"] * 2
    wanted = [recorded(doubled, flat) for flat in given]
    original = [recorded(program, flat) for flat in given]
    seen = 0

    def visit(site: Site, activations: Activations) -> None:
        nonlocal seen
        assert activations.reference is not None
        for n, (new, old) in enumerate(zip(activations, activations.reference, strict=True)):
            node = site.value.name
            assert torch.equal(new, _named(wanted[n], node).reshape(-1, site.width))
            assert torch.equal(old, _named(original[n], node).reshape(-1, site.width))
            seen += 1
        for product in site.products:
            if product.weight == "q.weight":
                program.weights["q.weight"] = program.weights["q.weight"] * 2

    sweep(program, given, visit, paired=True)
    assert seen == 6


def _named(values: dict[Node, Tensor], name: str) -> Tensor:
    return next(value for node, value in values.items() if node.name == name)


def test_what_follows_the_last_site_is_not_run_and_its_weights_are_not_read() -> None:
    program = shared()
    sites = product_sites(program)[:2]
    del program.weights["unread.weight"]
    sweep(program, batches(2), lambda site, activations: None, sites=sites)


def test_values_are_dropped_after_their_last_reader_and_shared_ones_are_kept_once() -> None:
    program = captured("llama")
    sites = product_sites(program)
    plan = schedule(program, [site.value for site in sites])
    ids = program.examples[0]
    given = [[ids if i is ids else i for i in program.examples] for _ in range(3)]
    for n, flat in enumerate(given):
        flat[0] = (ids + n) % 90
    stream = Stream(program, given, plan, program.weights.__getitem__)
    live = []
    for number in range(len(sites)):
        stream.advance(number)
        kept = {node: len(values) for node, values in stream._kept.items() if values}  # pyright: ignore[reportPrivateUsage]
        live.append(kept)
        stream.leave(number)
    assert max(len(kept) for kept in live) <= 12
    tables = [n for n in live[1] if "rotary" in n.meta.get("module", "")]
    assert tables
    assert all(live[1][n] == 1 for n in tables)
    assert live[1][sites[1].value] == 3


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_every_architecture_is_swept_to_the_values_of_a_plain_run(name: str) -> None:
    program = captured(name, zoo.ARCHITECTURES[name].attentions[0])
    flat = list(program.examples)
    wanted = recorded(program, flat)
    sites = product_sites(program)
    assert sites
    reached = 0

    def visit(site: Site, activations: Activations) -> None:
        nonlocal reached
        reached += 1
        (rows,) = activations
        assert torch.equal(rows, wanted[site.value].reshape(rows.shape))

    sweep(program, [flat], visit)
    assert reached == len(sites)


def test_observe_shows_each_batch_once_in_its_own_shape() -> None:
    program, given = shared(), batches(3, length=4)
    sites = product_sites(program)
    shapes = observe(program, given, sites, lambda node: _Shapes())
    assert [shapes[site.value].seen for site in sites] == [
        [(2, 4, 6)] * 3,
        [(2, 4, 10)] * 3,
        [(2, 4, 7)] * 3,
    ]


class _Shapes:
    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, value: Tensor) -> None:
        self.seen.append(tuple(value.shape))


def ignore(site: Site, activations: Activations) -> None:
    pass


def test_no_batches_and_empty_batches_are_told() -> None:
    with pytest.raises(CalibrationTooSmall, match="no calibration batches"):
        sweep(shared(), [], ignore)
    with pytest.raises(CalibrationTooSmall, match="a calibration batch is empty"):
        sweep(shared(), [[torch.zeros(2, 0, dtype=torch.long)]], ignore)
    with pytest.raises(WrongInput, match="batch 0 does not fit"):
        sweep(shared(), [[]], ignore)


def test_the_first_value_that_is_not_finite_is_named_with_its_module() -> None:
    program = shared()
    weight = program.weights["q.weight"].clone()
    weight[2, 1] = float("nan")
    program.weights["q.weight"] = weight
    with pytest.raises(NonFiniteActivation) as caught:
        sweep(program, batches(2), ignore)
    told = str(caught.value)
    assert "batch 0 makes %q NaN" in told
    assert "of q" in told
    assert "repair the weight q.weight" in told


def test_an_infinity_that_is_no_mask_is_named() -> None:
    program = shared()
    program.weights["table.weight"] = program.weights["table.weight"] * 1e38
    program.weights["v"] = program.weights["v"] * 1e38
    with pytest.raises(NonFiniteActivation, match="makes %"):
        sweep(program, batches(1), ignore)
