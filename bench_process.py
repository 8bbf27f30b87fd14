"""The driver's side of a contestant: its process, what it is asked, and why it cannot."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .bench_roster import Contestant

WORKER = Path(__file__).with_name("bench_worker.py")
PREPARE_SECONDS, ANSWER_SECONDS = 3600.0, 1800.0
SETTLE = 0.05
"""Seconds before an order: threads of the process that ran before spin for a while."""


class Cannot(Exception):
    """A contestant cannot do what it was asked; the text says why."""


@dataclass
class Worker:
    """A contestant's process."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    loaded: dict[str, Any] = field(default_factory=dict[str, Any])
    _rest: bytes = b""

    def ask(self, order: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Its answer; raises Cannot."""
        time.sleep(SETTLE)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Cannot(self._last_words()) from None
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line it writes; raises Cannot, also when it dies or takes too long."""
        assert self.process.stdout is not None
        stream, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([stream], [], [], max(0, deadline - time.monotonic()))[0]:
                self.close()
                raise Cannot(f"no answer within {seconds:.0f} s")
            more = os.read(stream, 1 << 16)
            if not more:
                raise Cannot(self._last_words())
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        found = json.loads(line)
        if "cannot" in found:
            raise Cannot(found["cannot"])
        return found

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with {code}: {lines[-1] if lines else 'no message'}"[:300]


@dataclass(frozen=True)
class Interpreters:
    """The Python of planish's environment and that of the peers', if there is one."""

    house: str = sys.executable
    peers: str | None = None

    def of(self, row: Contestant) -> str:
        """Raises Cannot."""
        if row.peer and self.peers is None:
            raise Cannot("the peers' environment was not given: make bench-peers")
        return (self.peers or self.house) if row.peer else self.house


def launch(python: str, order: Mapping[str, Any]) -> Worker:
    """Start a worker with an order; its first answer is still to be read."""
    threads = str(order.get("threads", 1))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, threads), "PYTHONSAFEPATH": "1"}
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
    process = subprocess.Popen(
        [python, str(WORKER), json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )
    return Worker(process, log)


def ask_once(python: str, order: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The one answer of a worker that only answers once; raises Cannot."""
    worker = launch(python, order)
    try:
        return worker.answer(seconds)
    finally:
        worker.close()
