"""The budget of machine code: what gets worse is found, with the old figure and the new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planish.kernels import budget
from planish.kernels.budget import Finding, check, demanded, regressions, update
from planish.kernels.figures import Figures, figures_of, measure
from planish.kernels.gated import SPEC as GATED
from planish.kernels.launch import Config
from planish.kernels.triton_spec import ARCHS, TritonSpec
from tiny_matmul import SMALL, SPILLING, TOO_LARGE, tiny_launch, tiny_spec

ARCH = ("sm_80",)
KEY = "tiny_matmul | one | BK=64,BM=64,BN=128,w4,s3 | sm_80 | hints"
BLIND = KEY.replace("hints", "no hints")
LARGER = Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8)
WARPS = Config(SMALL.constants, num_warps=8)


@pytest.fixture(scope="module")
def budgets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figures]:
    """Those of the kernel as it is, with eight warps, which spills nowhere."""
    file = tmp_path_factory.mktemp("budget") / "budgets.json"
    update([tiny_spec(replaces=WARPS)], ARCH, file)
    return budget.read(file)


def rules(findings: list[Finding], key: str = KEY) -> dict[str, tuple[str, str]]:
    return {f.rule: (f.old, f.new) for f in findings if f.key == key}


def test_the_kernel_that_was_measured_has_no_findings(budgets: dict[str, Figures]) -> None:
    assert set(budgets) == {KEY, BLIND}
    assert check(tiny_spec(replaces=WARPS), ARCH, budgets) == []


def test_a_larger_tile_is_found(budgets: dict[str, Figures]) -> None:
    larger = figures_of(tiny_launch(config=LARGER), "sm_80", hints=True)
    found = rules(check(tiny_spec(replaces=LARGER), ARCH, budgets))
    assert found["registers"] == (str(budgets[KEY].regs), str(larger.regs))
    assert found["shared memory"] == (str(budgets[KEY].smem), str(larger.smem))
    assert larger.smem > budgets[KEY].smem


def test_spilling_is_found_by_the_budget_and_by_the_rule(budgets: dict[str, Figures]) -> None:
    found = rules(check(tiny_spec(replaces=SPILLING), ARCH, budgets))
    assert found["registers"] == (str(budgets[KEY].regs), "255")
    assert found["stack"][0] == "0"
    assert int(found["stack"][1]) > 0
    assert found["registers spilled"][0] == "at most 0"
    fresh = rules(
        check(tiny_spec(config=SPILLING), ARCH, {}), KEY.replace(SMALL.name, SPILLING.name)
    )
    assert "registers spilled" in fresh


def test_lost_hints_are_lost_wide_loads(budgets: dict[str, Figures]) -> None:
    """A row of 500 values of 16 bits does not begin at a multiple of 16 bytes: the budget finds
    that loads got narrow, while the rule asks nothing of such rows.
    """
    findings = check(tiny_spec(replaces=WARPS, inner=500), ARCH, budgets)
    found = rules(findings)
    assert found["128-bit loads"] == (str(budgets[KEY].wide), "0")
    assert found["asynchronous copies"] == (str(budgets[KEY].copies), "0")
    assert "128-bit loads with hints" not in found
    assert rules(findings, BLIND) == {}


def test_tiles_too_small_for_wide_loads_break_the_rule() -> None:
    """256 values for 128 threads: two for each."""
    tile = Config({"BM": 16, "BN": 16, "BK": 16})
    findings = check(tiny_spec(config=tile), ARCH, {})
    found = rules(findings, KEY.replace(SMALL.name, tile.name))
    assert found["128-bit loads with hints"] == ("at least 1", "0")
    assert set(rules(findings, BLIND.replace(SMALL.name, tile.name))) == {"has no budget"}


def test_another_matrix_family_is_found(budgets: dict[str, Figures]) -> None:
    found = rules(check(tiny_spec(replaces=WARPS, dtype=torch.int8), ARCH, budgets))
    assert found["mma in the inner loop"] == (str(budgets[KEY].mma["mma"]), "0")
    asked = rules(check(tiny_spec(replaces=WARPS, expects="int8 mma"), ARCH, budgets))
    assert asked == {"int8 mma in the inner loop": ("at least 1", "32 mma")}


def test_float32_without_tf32_has_no_matrix_instructions() -> None:
    tile = Config({"BM": 16, "BN": 16, "BK": 16}, num_warps=1)
    spec = tiny_spec(dtype=torch.float32, config=tile)
    found = rules(check(spec, ARCH, {}), KEY.replace(SMALL.name, tile.name))
    assert found["mma in the inner loop"] == ("at least 1", "none")


def test_what_does_not_compile_is_found(budgets: dict[str, Figures]) -> None:
    found = rules(check(tiny_spec(replaces=TOO_LARGE), ARCH, budgets))
    assert "196608 bytes of shared memory" in found["compiles"][1]
    assert found["no longer compiled"] == ("in the budget", "none")


def test_what_the_kernel_refuses_is_not_compiled() -> None:
    assert measure(tiny_spec(inner=8), ARCH) == []
    only = replace(tiny_spec(), configs=(replace(SMALL, archs=("gfx",)),))
    assert measure(only, ARCH) == []


def test_a_kernel_without_a_budget_is_found() -> None:
    found = check(tiny_spec(replaces=WARPS), ARCH, {})
    assert [(f.key, f.rule) for f in found] == [(KEY, "has no budget"), (BLIND, "has no budget")]


FIGURES = Figures(100, smem=1024, mma={"mma": 8}, wide=4, copies=2, prmt=3, warps=16)


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (replace(FIGURES, regs=108), None),
        (replace(FIGURES, regs=109), ("registers", "100", "109")),
        (replace(FIGURES, stack=8), ("stack", "0", "8")),
        (replace(FIGURES, smem=1025), ("shared memory", "1024", "1025")),
        (replace(FIGURES, smem=1023), None),
        (replace(FIGURES, mma={"mma": 1}), None),
        (replace(FIGURES, mma={"int8 mma": 8}), ("mma in the inner loop", "8", "0")),
        (replace(FIGURES, wide=3), ("128-bit loads", "4", "3")),
        (replace(FIGURES, wide=5), None),
        (replace(FIGURES, copies=1), None),
        (replace(FIGURES, copies=0), ("asynchronous copies", "2", "0")),
        (replace(FIGURES, prmt=4), ("permutations in the inner loop", "3", "4")),
        (replace(FIGURES, prmt=2), None),
    ],
)
def test_what_counts_as_worse(new: Figures, found: tuple[str, str, str] | None) -> None:
    findings = regressions(KEY, FIGURES, new)
    assert findings == ([] if found is None else [Finding(KEY, *found)])


def test_what_is_demanded_of_an_architecture() -> None:
    assert [demanded("fp8 mma", arch) for arch in ARCHS] == [
        (),
        *[("fp8 mma",)] * 4,
        *[("fp8 mma", "mma")] * 2,
    ]
    assert demanded("int8 mma", "gfx1100") == ("int8 mma",)
    assert demanded("", "sm_90") == ()


def test_the_file_has_a_line_an_entry_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    others = {
        "other | one | c | sm_80 | hints": FIGURES,
        "tiny_matmul | one | c | sm_90 | hints": FIGURES,
        "tiny_matmul/0:k | gone | c | sm_80 | hints": FIGURES,
    }
    budget.write(others, file)
    assert budget.read(file) == others
    update([tiny_spec(replaces=WARPS)], ARCH, file)
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [key for key in others if "gone" not in key]
    assert [line.split(": {")[0].strip('"') for line in lines[1:-1]] == sorted([*kept, KEY, BLIND])


def test_the_command_compares_and_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["gated", "--arch", "sm_80", "--check"]
    assert budget.main(asked) == 0
    file = tmp_path / "budgets.json"
    lean = {key: replace(figures, regs=1) for key, figures in budget.read().items()}
    budget.write(lean, file)
    monkeypatch.setattr(budget, "FILE", file)
    monkeypatch.setattr(budget, "read", lambda: lean)
    assert budget.main(asked) == 1
    assert "registers: 1 -> " in capsys.readouterr().out


def test_several_launches_are_told_apart() -> None:
    def twice(**args: object) -> object:
        plan = GATED.plan(**args)
        return replace(plan, launches=plan.launches * 2)

    spec: TritonSpec = replace(GATED, plan=twice, configs=GATED.configs[:1])
    keys = [key.split(" | ")[0] for one in measure(spec, ARCH) for key in one.launches]
    assert keys == ["gated/0:gated_kernel", "gated/1:gated_kernel"] * 2


def test_what_is_checked_in_breaks_no_rule_about_spills() -> None:
    shipped = budget.read()
    assert any(key.startswith("gated | ") for key in shipped)
    assert [key for key, figures in shipped.items() if figures.spills] == []
