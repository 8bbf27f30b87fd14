"""Tensor memory of a block (sm_100): 128 lanes of 512 columns of 32 bits, and who is using it.

Products compute at once, but until a thread waited at the mbarrier of a later tcgen05.commit their
accumulators may not be touched, nor their operands in shared memory be overwritten: a Fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, OutOfBounds
from .ptx_mbarrier import Place
from .ptx_state import State

Array = NDArray[Any]

LANES, COLUMNS = 128, 512


@dataclass(slots=True)
class Product:
    """A product under way: the shared memory that it reads, the columns that it adds into."""

    operands: list[Place]
    goal: tuple[Array, slice]


class TensorMemory:
    """Tensor memory of a block and the products under way."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.data = np.zeros((LANES, COLUMNS), np.uint32)
        self.busy = np.zeros((LANES, COLUMNS), np.int16)
        self.stored = np.zeros((LANES, COLUMNS), bool)
        self.used = 0
        self.products: list[Product] = []
        state.on_start.append(self.clear)
        state.shared.proxies = True
        state.shared.holders.append(lambda: [p for one in self.products for p in one.operands])

    def clear(self) -> None:
        self.data.fill(0)
        self.busy.fill(0)
        self.stored.fill(False)
        self.used, self.products = 0, []

    def started(self, product: Product) -> None:
        self.products.append(product)
        self.busy[product.goal] += 1
        self.state.shared.hold(product.operands)

    def retire(self, products: list[Product]) -> None:
        """A thread waited for them."""
        done = {id(product) for product in products}
        for product in self.products:
            if id(product) in done:
                self.busy[product.goal] -= 1
        self.products = [one for one in self.products if id(one) not in done]
        self.state.shared.rehold()

    def region(self, lanes: Array, column: int, count: int) -> tuple[Array, slice]:
        """An index of columns [column, column + count) of lanes; a Fault beyond the memory."""
        if column < 0 or column + count > self.used or (lanes < 0).any() or (lanes >= LANES).any():
            raise Fault(
                OutOfBounds,
                "tensor memory is used where it was not allocated",
                expected=f"{LANES} lanes, {self.used} columns",
                found=f"lanes {lanes.min()} to {lanes.max()}, {count} columns from {column}",
            )
        return lanes, slice(column, column + count)

    def idle(self, region: Any) -> None:
        if self.state.check and self.busy[region].any():
            raise Fault(
                NotWaitedFor,
                "tensor memory is touched while a product may still add into it",
                expected="a wait at the mbarrier of tcgen05.commit",
            )

    def settled(self, region: Any) -> None:
        if self.state.check and self.stored[region].any():
            raise Fault(
                NotWaitedFor,
                "a product reads tensor memory that is still being written",
                expected="tcgen05.wait::st after tcgen05.st",
            )


def tensor_memory(state: State) -> TensorMemory:
    """The block's only TensorMemory."""
    if "tensor memory" not in state.part:
        state.part["tensor memory"] = TensorMemory(state)
    return state.part["tensor memory"]
