"""Every shipped Triton kernel up the whole ladder: `make test-kernels`.

Each test is one kernel on one group of rungs, in the processes of `planish verify-kernel`.
"""

from __future__ import annotations

import pytest
from planish.kernel_ladder import verify_kernels
from planish.kernels.triton_spec import ARCHS
from shipped_kernels import NAMES

pytestmark = pytest.mark.slow


def climb(name: str, *rungs: int, archs: tuple[str, ...] = ARCHS) -> None:
    for result in verify_kernels(name, rungs, archs):
        failed = [one for one in result.outcomes if one.status == "failed"]
        told = [f"rung {one.rung}, {one.title}: {one.sentence}" for one in failed]
        assert not told, "\n".join(told)
        assert result.status == "ok", result.sentence


@pytest.mark.parametrize("name", NAMES)
def test_the_operation(name: str) -> None:
    climb(name, 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_machine_code_and_budgets(name: str, arch: str) -> None:
    climb(name, 2, 3, archs=(arch,))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_is_right(name: str) -> None:
    climb(name, 4)


@pytest.mark.parametrize("name", NAMES)
def test_broken_copies_are_caught(name: str) -> None:
    climb(name, 5)
