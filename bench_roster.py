"""Who takes part in a benchmark, and on which model.

A contestant is declared in a file of its engine, which any environment can import:

    CONTESTANTS: a list of the fields of `Contestant`, without module and peer
    IMPORTS: packages to import before loading is timed
    PACKAGES: distributions whose versions tell one engine from another
    prepare(options, model, out) -> facts: write what is loaded into the new folder `out`
    load(options, model, path, threads) -> an engine of bench_worker
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .bench_worker import load_module

Kind = Literal["decoder", "encoder"]

HOUSE = ("planish.bench_torch", "planish.bench_onnxruntime", "planish.bench_planish")
"""The engines that planish's own environment has."""


@dataclass(frozen=True)
class BenchModel:
    """A model in a Hugging Face folder, and what its size says about bytes and operations.

    matmul, table: weights of the layers' matrix products, and of one table of the vocabulary.
    cache: numbers that one token keeps in the KV cache.
    """

    name: str
    kind: Kind
    folder: str
    gguf: str | None
    layers: int
    width: int
    vocabulary: int
    cache: int
    matmul: int
    table: int
    parameters: int

    @classmethod
    def read(cls, name: str, kind: Kind, folder: Path, gguf: Path | None = None) -> BenchModel:
        """Of a folder with config.json and safetensors; counts are taken from the tensors."""
        config = json.loads((folder / "config.json").read_text())
        vocabulary, width = config["vocab_size"], config["hidden_size"]
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        shapes = tensor_shapes(folder)
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        matmul = sum(
            math.prod(shape) for shape in matrices if shape[1] == width or shape[0] == width
        )
        tables = [math.prod(shape) for shape in matrices if shape[0] == vocabulary]
        return cls(
            name=name,
            kind=kind,
            folder=str(folder),
            gguf=str(gguf) if gguf else None,
            layers=layers,
            width=width,
            vocabulary=vocabulary,
            cache=2 * layers * (config.get("num_key_value_heads") or heads) * head,
            matmul=matmul - sum(tables),
            table=max(tables, default=0),
            parameters=sum(math.prod(shape) for shape in shapes.values()),
        )

    def told(self) -> dict[str, Any]:
        """As JSON, for another process."""
        return asdict(self)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes in the headers of a folder's safetensors files."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: told["shape"] for name, told in header.items() if name != "__metadata__"}
    return shapes


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    bits, head_bits: stored for a weight of the layers and of the output head, scales included.
    cache_bits: of a number in the KV cache. compute: what products of a long prompt are made of.
    peer: runs in the peers' environment. heat: rows of one heat are in memory together.
    """

    name: str
    kind: Kind
    module: str
    peer: bool = False
    bits: float = 32
    head_bits: float = 32
    cache_bits: int = 32
    compute: Literal["float32", "int8"] = "float32"
    heat: str = "float32"
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{self.kind}-{self.name}")


def contestants(kind: Kind, peers: Path | None = None) -> list[Contestant]:
    """All of a kind: the house's, and those of the files in the folder `peers`.

    The first one is the baseline that ratios are to.
    """
    modules = [(name, False) for name in HOUSE]
    modules += [(str(file), True) for file in sorted(peers.glob("*.py"))] if peers else []
    rows = [
        Contestant(module=module, peer=peer, **row)
        for module, peer in modules
        for row in load_module(module).CONTESTANTS
    ]
    return [row for row in rows if row.kind == kind]
