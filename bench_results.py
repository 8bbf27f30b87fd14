"""The results of a benchmark: records in a file of JSON lines, one added after each measure.

A run that was broken off goes on: what the file has is not measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_DONE = {"prepared": "everything", "loaded": "loading", "quality": "quality"}
"""What a record shows to be possible after all; a speed, its measure."""
_KEYS = ("record", "model", "contestant", "key", "threads", "measure")


class Results:
    """Records by what they are about; a later one replaces an earlier one.

    record: run, limits, prepared, loaded, quality, speed, memory, passes or cannot.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found: dict[tuple[Any, ...], Record] = {}
        if file.is_file():
            for line in file.read_text().splitlines():
                self._keep(json.loads(line))

    def add(self, record: str, **told: Any) -> Record:
        """Write a record at once."""
        made = {"record": record, **told}
        self._keep(made)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            stream.write(json.dumps(made) + "\n")
        return made

    def _keep(self, record: Record) -> None:
        """What was done after all is no longer said to be impossible."""
        kind = record["record"]
        if kind in _DONE or kind == "speed":
            failed = {**record, "record": "cannot"}
            failed["measure"] = _DONE.get(kind, record.get("measure"))
            if kind == "prepared":
                failed["key"] = None  # who cannot be prepared has none
            self._found.pop(_key(failed), None)
        self._found.pop(_key(record), None)
        self._found[_key(record)] = record

    def get(self, record: str, **about: Any) -> Record | None:
        """The record about exactly this."""
        return self._found.get(_key({"record": record, **about}))

    def all(self, record: str, **about: Any) -> list[Record]:
        """Those that agree with all of `about`, in the order they were written."""
        return [
            found
            for found in self._found.values()
            if found["record"] == record and all(found.get(k) == v for k, v in about.items())
        ]


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _KEYS)
