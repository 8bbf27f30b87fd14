"""Every shipped Triton kernel, in every configuration, holds its budget and the rules."""

from __future__ import annotations

import pytest
from planish.kernels.budget import check
from planish.kernels.catalog import triton_kernels
from planish.kernels.triton_spec import ARCHS


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", sorted(triton_kernels()))
def test_the_budget_of(name: str, arch: str) -> None:
    assert [str(finding) for finding in check(triton_kernels()[name], (arch,))] == []
