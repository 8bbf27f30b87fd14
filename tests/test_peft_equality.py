"""The benchmark that compares merges with PEFT's own runs, and says that they are equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "peft_equality.py"


@pytest.mark.slow
def test_a_table_of_two_kinds(tmp_path: Path) -> None:
    kinds = ["LoRA", "BEFT (BitFit)"]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--only", *kinds]
    subprocess.run(command, check=True, capture_output=True)
    lines = (tmp_path / "peft_equality.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert [row[0] for row in rows] == kinds
    assert all(int(row[3]) > 0 and float(row[4]) <= 4 for row in rows)
    assert "peft" in lines[-1]
