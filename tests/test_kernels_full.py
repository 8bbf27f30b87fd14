"""Every shipped Triton kernel up the ladder: `make test-kernels`.

Each test is one kernel on one rung, in the process of `planish verify-kernel`. Machine code and
budgets (rungs 2 and 3) are in test_budget_all.py.
"""

from __future__ import annotations

import pytest
from planish.kernel_ladder import verify_kernels
from shipped_kernels import NAMES

pytestmark = pytest.mark.slow


def climb(name: str, rung: int) -> None:
    for result in verify_kernels(name, [rung]):
        failed = [one for one in result.outcomes if one.status == "failed"]
        told = [f"rung {one.rung}, {one.title}: {one.sentence}" for one in failed]
        assert not told, "\n".join(told)
        assert result.status == "ok", result.sentence


@pytest.mark.parametrize("name", NAMES)
def test_the_operation(name: str) -> None:
    climb(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_is_right(name: str) -> None:
    climb(name, 4)


@pytest.mark.parametrize("name", NAMES)
def test_broken_copies_are_caught(name: str) -> None:
    climb(name, 5)
