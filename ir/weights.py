"""Weights by the model's own names: ties kept, lazy, dense or encoded.

An entry is a dense tensor (often memory-mapped from a file), an `Encoded` tensor of some number
format, or a `Derived` one: a recipe over other entries that is computed when somebody reads it.
A program reads `weights[name]` and always gets a dense tensor; targets that can do better look at
`weights.entry(name)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .errors import UnknownWeight
from .memory_budget import memory_budget
from .resident import release
from .spool import spooled
from .weight_entry import Derived, EncodedTensor, Entry, dense, entry_bytes


class Weights(Mapping[str, Tensor]):
    """A mapping name -> dense tensor over dense, encoded and derived entries.

    Tied weights have one entry; their other names are in `aliases` and read through.
    Copies share the entries, so copying is cheap and an edit of a copy leaves the original alone.
    """

    def __init__(
        self, entries: Mapping[str, Entry] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self._entries: dict[str, Entry] = dict(entries or {})
        self.aliases: dict[str, str] = dict(aliases or {})
        self._nbytes: int | None = None

    def canonical(self, name: str) -> str:
        """The name under which a weight is kept; raises UnknownWeight."""
        name = self.aliases.get(name, name)
        if name not in self._entries:
            raise UnknownWeight.named(name, self._entries)
        return name

    def entry(self, name: str) -> Entry:
        """The weight as it is kept: dense, encoded or derived."""
        return self._entries[self.canonical(name)]

    def __getitem__(self, name: str) -> Tensor:
        return dense(self.entry(name))

    def __setitem__(self, name: str, entry: Entry) -> None:
        """Put a weight in; where all of them exceed the memory budget, in a scratch file."""
        name = self.aliases.get(name, name)
        kept, old = self.nbytes(), self._entries.get(name)
        if kept > memory_budget():
            entry = spooled(entry)
            if old is not None:
                release(old)
        self._entries[name] = entry
        self._nbytes = kept + entry_bytes(entry) - (0 if old is None else entry_bytes(old))

    def __delitem__(self, name: str) -> None:
        name = self.canonical(name)
        self._nbytes = self.nbytes() - entry_bytes(self._entries.pop(name))
        self.aliases = {a: n for a, n in self.aliases.items() if n != name}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.aliases

    def names_of(self, name: str) -> list[str]:
        """The canonical name and every alias of a weight."""
        name = self.canonical(name)
        return [name, *(alias for alias, kept in self.aliases.items() if kept == name)]

    def fresh_name(self, wanted: str) -> str:
        """`wanted`, or `wanted_2`, ... if it is taken."""
        name, count = wanted, 1
        while name in self:
            count += 1
            name = f"{wanted}_{count}"
        return name

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def nbytes(self) -> int:
        """Bytes of all entries as they are kept, each tie once."""
        if self._nbytes is None:
            self._nbytes = sum(entry_bytes(entry) for entry in self._entries.values())
        return self._nbytes

    def parameter_count(self) -> int:
        """Logical elements of all floating-point entries, each tie once."""
        kept = self._entries.values()
        return sum(math.prod(e.shape) for e in kept if e.dtype.is_floating_point)

    def copy(self) -> Weights:
        return Weights(self._entries, self.aliases)


def find_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that show the same memory in the same way: {alias: first name}."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


__all__ = ["Derived", "EncodedTensor", "Entry", "Weights", "dense", "entry_bytes", "find_ties"]
