"""Launches are compiled for architectures that are not there; what cannot be is said plainly."""

from __future__ import annotations

import re

import pytest
import torch
from planish.kernels.aot import CannotCompileHere, KernelDoesNotCompile, compile_launch
from planish.kernels.gated import SPEC
from planish.kernels.launch import Launch
from planish.kernels.occupancy import UnknownArch
from planish.kernels.triton_spec import ARCHS
from tiny_matmul import TOO_LARGE, tiny_launch


def gate(columns: int = 4096) -> Launch:
    both = torch.empty(8, 2 * columns, dtype=torch.bfloat16, device="meta")
    halves = {"gate": both[:, :columns], "up": both[:, columns:]}
    return SPEC.plan(**halves, activation="silu").launches[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_compiles_for_every_architecture(arch: str) -> None:
    compiled = compile_launch(gate(), arch)
    assert compiled.binary.startswith(b"\x7fELF")
    assert compiled.name == "gated_kernel"
    if arch.startswith("sm_"):
        assert f".target {arch}" in compiled.ptx
        assert compiled.assembly == ""
    else:
        assert re.search(rf'\.amdgcn_target "\S*-{arch}"', compiled.assembly)
        assert compiled.ptx == ""
    assert compiled.threads == (256 if arch == "gfx942" else 128)
    assert compiled.global_scratch == compiled.profile_scratch == 0


def test_hints_make_wide_loads_and_are_what_the_jit_would_know() -> None:
    hinted, plain = compile_launch(gate(), "sm_80"), compile_launch(gate(), "sm_80", hints=False)
    assert set(hinted.aligned) == {"GATE", "UP", "OUT", "columns", *STRIDES}
    assert "ld.global.v4" in hinted.ptx
    assert plain.aligned == plain.ones == ()
    assert "ld.global.v4" not in plain.ptx


STRIDES = ("gate_stride", "up_stride", "out_stride")


def test_odd_sizes_are_not_taken_for_aligned() -> None:
    compiled = compile_launch(gate(columns=4097), "sm_80")
    assert set(compiled.aligned) == {"GATE", "UP", "OUT"}
    assert "ld.global.v4" not in compiled.ptx


def test_parameters_are_those_of_run_time() -> None:
    given = ("A", "B", "OUT", "columns", "inner", "a_row", "b_row")
    without = compile_launch(tiny_launch(), "sm_80")
    assert without.parameters == given
    assert without.ones == ("a_column",)
    biased = compile_launch(tiny_launch(bias=True), "sm_80", hints=False)
    assert biased.parameters == ("A", "B", "BIAS", *given[2:6], "a_column", "b_row")
    assert biased.signature["BIAS"] == "*fp16"
    assert biased.signature["BM"] == "constexpr"


def test_what_the_jit_shall_not_specialize_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {parameter.name: parameter for parameter in tiny_launch().kernel.params}
    for name in ("a_column", "a_row"):
        monkeypatch.setitem(parameters[name].__dict__, "do_not_specialize", True)
    on_alignment = "do_not_specialize_on_alignment"
    monkeypatch.setitem(parameters["b_row"].__dict__, on_alignment, True)
    compiled = compile_launch(tiny_launch(), "sm_80")
    assert compiled.ones == ()
    assert compiled.aligned == ("A", "B", "OUT", "columns", "inner")


def test_pointers_are_near_on_amd_only() -> None:
    assert compile_launch(gate(), "gfx942").near == ("GATE", "UP", "OUT")
    assert compile_launch(gate(), "gfx942", hints=False).near == ()
    assert compile_launch(gate(), "sm_90").near == ()


def test_too_much_shared_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(KernelDoesNotCompile) as raised:
        compile_launch(tiny_launch(config=TOO_LARGE), "sm_80")
    text = str(raised.value)
    assert "tiny_matmul_kernel does not compile for sm_80" in text
    assert "BK=256,BM=64,BN=64,w4,s4" in text
    assert f"at most {163 * 1024}" in text
    assert "196608 bytes of shared memory" in text


def test_the_compilers_message_is_passed_on() -> None:
    with pytest.raises(KernelDoesNotCompile, match="fp8e4nv not supported in this architecture"):
        compile_launch(tiny_launch(torch.float8_e4m3fn), "sm_80")


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnknownArch, match="sm_81"):
        compile_launch(gate(), "sm_81")


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CannotCompileHere, match="gated_kernel cannot be compiled in a process"):
        compile_launch(gate(), "sm_80")
