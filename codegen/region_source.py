"""A region as readable Triton source: a kernel and the function that plans its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .find_regions import space_in
from .region import Region
from .row_space import Space, broadcast_axes, form_of, is_one
from .triton_expressions import HALVES, Call, compute_dtype
from .triton_operations import HANDLERS, ROW_WISE

_TILE = 1024  # values of a tile without row operations
_ROW_TILE = 4096  # values of a tile of whole rows


@dataclass(frozen=True)
class Source:
    """Generated text.

    text: the definitions, the name left open as {name}; leads: for each input that is broadcast
    along some leading axes, the shape that it is expanded to.
    """

    text: str
    words: str
    space: Space
    leads: tuple[tuple[Any, ...] | None, ...] = ()

    def named(self, name: str, provenance: str = "") -> str:
        return self.text.replace("{name}", name).replace("{provenance}", provenance)


def region_source(region: Region) -> Source:
    """The kernel of a region; raises Unfusible only if `find_regions` would have declined."""
    return _Writer(region).source()


class _Writer:
    def __init__(self, region: Region) -> None:
        self.region = region
        self.space = _space(region)
        self.body: list[str] = []
        self.prepared: list[str] = []
        self.parameters: list[str] = []
        self.arguments: list[tuple[str, str]] = []
        self.leads: list[tuple[Any, ...] | None] = []
        self.read: dict[fx.Node, str] = {}

    @property
    def columns(self) -> str:
        """The row's length in the kernel's text."""
        known = isinstance(self.space.columns, int)
        return str(self.space.columns) if known else "columns"

    def source(self) -> Source:
        for place, placeholder in enumerate(self.region.placeholders):
            self._load(place, placeholder)
        for node in self.region.operations:
            write_operation(node, self.read, self.body.append, self.columns)
        outputs = [self._store(place, node) for place, node in enumerate(self._results())]
        if self.columns == "columns":
            self.parameters.append("columns")
            self.arguments.append(("columns", "columns"))
        rows, columns, warps = self._tiles()
        words = "_".join(dict.fromkeys(operation_word(n) for n in self.region.operations))
        first = next(i for i, p in enumerate(self.region.placeholders) if _is_tensor(p))
        text = _template("region.py.jinja").render(
            name="{name}",
            summary="{provenance}",
            parameters=self.parameters,
            body=self.body,
            inputs=[p.name for p in self.region.placeholders],
            prepared=self.prepared,
            outputs=outputs,
            arguments=self.arguments,
            columns=self.columns,
            row_block=rows,
            column_block=columns,
            warps=warps,
            device=f"x{first}.device",
        )
        return Source(text, words, self.space, tuple(self.leads))

    def _results(self) -> list[fx.Node]:
        return [self.region.inner[node] for node in self.region.results]

    def _tiles(self) -> tuple[int, int, int]:
        """Rows and columns of a tile, and warps."""
        whole = any(node.target in ROW_WISE for node in self.region.operations)
        width = self.space.columns if isinstance(self.space.columns, int) else _TILE
        width = 1 << max(width - 1, 0).bit_length()
        if not whole:
            width = min(width, _TILE)
            return max(1, _TILE // width), width, 4
        rows = max(1, min(16, _ROW_TILE // width // 4))
        return rows, width, 8 if rows * width > _ROW_TILE else 4

    def _load(self, place: int, placeholder: fx.Node) -> None:
        name, pointer = placeholder.name, f"X{place}"
        lead: tuple[Any, ...] | None = None
        if not _is_tensor(placeholder):
            self.parameters.append(f"{name}_size")
            self.arguments.append((f"{name}_size", name))
            self.read[placeholder] = f"{name}_size"
            self.leads.append(None)
            return
        value: Tensor = placeholder.meta["val"]
        shape = _reader_shape(placeholder)
        column = "" if value.dim() == 0 or is_one(value.shape[-1]) else " + col"
        self.parameters.append(pointer)
        self.arguments.append((pointer, name))
        form = "vector" if value.dim() == 0 else form_of(value, shape)
        if form == "vector":
            self.prepared.append(f"{name} = as_vector({name})")
            at, mask = f"{pointer}{column}", f"col < {self.columns}" if column else ""
        elif form == "rows":
            self.prepared.append(f"{name} = as_rows({name}, {name}.shape[-1])")
            at = f"{pointer} + row * {self._argument(f'{pointer}_row', f'{name}.stride(0)')}"
            at, mask = at + column, "inside" if column else "row < rows"
        else:
            lead = (*shape[:-1], value.shape[-1])
            at = self._general(place, name, pointer, value, shape) + column
            mask = "inside" if column else "row < rows"
        self.leads.append(lead)
        if not mask and not column:
            mask = ""
        masked = f", mask={mask}, other=0" if mask else ""
        self.body.append(f"{name} = {_loaded(f'tl.load({at}{masked})', value.dtype)}")
        self.read[placeholder] = name

    def _general(self, place: int, name: str, pointer: str, value: Tensor, shape: Any) -> str:
        """The address of an operand that is broadcast along some leading axes only."""
        self.prepared.append(f"{name} = {name}.expand(leads[{place}])")
        axes, rest, terms = broadcast_axes(value, shape), "row", list[str]()
        for axis in range(len(shape) - 2, -1, -1):
            size = self._argument(f"{pointer}_size{axis}", f"leads[{place}][{axis}]")
            if axis in axes:
                stride = self._argument(f"{pointer}_stride{axis}", f"{name}.stride({axis})")
                index = f"({rest} % {size})" if axis else f"({rest})"
                terms.append(f"{index} * {stride}")
            rest = f"({rest} // {size})"
        if not is_one(value.shape[-1]):
            self.prepared.append(
                f"{name} = {name} if {name}.stride(-1) == 1 else {name}.contiguous()"
            )
        return " + ".join([pointer, *terms])

    def _argument(self, name: str, value: str) -> str:
        self.parameters.append(name)
        self.arguments.append((name, value))
        return name

    def _store(self, place: int, node: fx.Node) -> dict[str, str]:
        pointer, value = f"Y{place}", node.meta["val"]
        self.parameters.append(pointer)
        self.arguments.append((pointer, f"y{place}"))
        narrow = is_one(value.shape[-1]) and self.space.columns != 1
        at = f"{pointer} + row" if narrow else f"{pointer} + row * {self.columns} + col"
        mask = "row < rows" if narrow else "inside"
        text = f"{self.read[node]}.to({pointer}.dtype.element_ty)"
        self.body.append(f"tl.store({at}, {text}, mask={mask})")
        return {"name": f"y{place}", "dtype": str(value.dtype)}


def _space(region: Region) -> Space:
    spaces = [space_in(node) for node in region.operations]
    return next((space for space in spaces if space.columns != 1), spaces[0])


def _reader_shape(placeholder: fx.Node) -> Any:
    """The shape that an input is broadcast to: that of the first operation that reads it."""
    reader = next(iter(placeholder.users))
    if reader.target in ROW_WISE:
        first = reader.args[0]
        assert isinstance(first, fx.Node)
        return first.meta["val"].shape
    return reader.meta["val"].shape


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _loaded(load: str, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return f"({load} != 0)"
    return f"{load}.to(tl.float32)" if dtype in HALVES else load


def write_operation(
    node: fx.Node, names: dict[fx.Node, str], line: Callable[[str], None], columns: str
) -> None:
    """The line that computes an operation, into a variable named after it."""
    name = f"{operation_word(node)}_{len(names)}"
    call = Call(node, name, names.__getitem__, line, columns)
    text = HANDLERS[node.target](call)
    compute_dtype(node.meta["val"].dtype)
    line(f"{name} = {text}")
    names[node] = name


def operation_word(node: fx.Node) -> str:
    """A short name: add, rms_norm, to_copy."""
    target: Any = node.target
    return target._schema.name.split("::")[-1].strip("_")


@functools.cache
def _template(name: str) -> Any:
    import jinja2

    folder = Path(__file__).parent
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        (folder / name).read_text(encoding="utf-8")
    )


_EPILOGUE = '''@triton.jit
def {name}(
    sums, rows, columns, inside,
    E0, E0_row, E0_col, E1, E1_row, E1_col, E2, E2_row, E2_col, E3, E3_row, E3_col,
    ACTIVATION: tl.constexpr,
):
    """{provenance}"""
    if E0 is not None:
        sums += operand(E0, E0_row, E0_col, rows, columns, inside)
    x0 = sums
'''


def epilogue_source(region: Region) -> Source:
    """A region as the epilogue of a matmul: its first input are the sums, E0 is the bias."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for place, placeholder in enumerate(region.placeholders):
        names[placeholder] = f"x{place}"
        if place:
            strides = f"E{place}, E{place}_row, E{place}_col"
            lines.append(f"x{place} = operand({strides}, rows, columns, inside)")
    for node in region.operations:
        write_operation(node, names, lines.append, "columns")
    lines.append(f"return {names[region.inner[region.results[0]]]}")
    words = "_".join(dict.fromkeys(operation_word(n) for n in region.operations))
    text = _EPILOGUE + "".join(f"    {line}\n" for line in lines)
    return Source(text, words, _space(region))


_PROLOGUE = '''@triton.jit
def {name}(x0, rows, along, inside, P1, P1_row, P2, P2_row):
    """{provenance}"""
'''


def prologue_source(region: Region) -> Source:
    """A region as the prologue of a matmul: its first input is the tile that was loaded."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for place, placeholder in enumerate(region.placeholders):
        names[placeholder] = f"x{place}"
        if place:
            lines.append(f"x{place} = prologue_source(P{place}, P{place}_row, rows, along, inside)")
    for node in region.operations:
        write_operation(node, names, lines.append, "columns")
    lines.append(f"return {names[region.inner[region.results[0]]]}")
    words = "_".join(dict.fromkeys(operation_word(n) for n in region.operations))
    text = _PROLOGUE + "".join(f"    {line}\n" for line in lines)
    return Source(text, f"prepare_{words}", _space(region))
