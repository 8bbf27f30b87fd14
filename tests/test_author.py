"""The example of a new pass runs, keeps its contract and explains itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from planish import Program
from planish.ir.text import op_text

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "examples" / "author_a_pass.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("author_a_pass", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ops(program: Program) -> list[str]:
    return [op_text(node) for node in program.graph.nodes if node.op == "call_function"]


def test_the_example(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example.main()
    told = capsys.readouterr().out
    assert ops(before).count("log") == 2
    assert ops(after).count("log") == 1
    assert ops(after).count("log_softmax") + ops(after).count("log_softmax.int") == 1
    assert "2 values read the probabilities, not only the log" in told
    (record,) = after.history
    assert (len(record.applied), len(record.declined)) == (1, 1)
    assert record.measured
    assert record.measured[0].after <= record.measured[0].allowed
    x = torch.randn(3, 12)
    for want, have in zip(before(x), after(x), strict=True):
        torch.testing.assert_close(have, want)


def test_the_pass_takes_under_twenty_lines() -> None:
    text = FILE.read_text(encoding="utf-8")
    body = text.split("# The pass: 15 lines.\n")[1].split("class TwoHeads")[0]
    lines = [line for line in body.splitlines() if line.strip()]
    assert len(lines) == 15


def test_where_the_old_form_gives_minus_infinity_the_new_one_does_not(
    example: ModuleType,
) -> None:
    """What the pass is for: a probability that underflows."""
    _, after = example.main()
    x = torch.full((1, 12), 2000.0)
    assert torch.isfinite(after(x)[0]).all()
