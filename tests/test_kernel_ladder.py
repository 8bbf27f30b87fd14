"""The ladder lets a sound kernel up and stops a broken one at the rung that can see the mistake."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from planish import cli, kernel_ladder
from planish.ir.errors import WrongOption
from planish.kernel_ladder import parse_rungs, verify_kernels
from planish.kernels.ladder_judge import judge
from planish.kernels.ladder_problem import Ask, arguments_of, judged, plan_of
from planish.kernels.ladder_result import Outcome, conclude
from planish.kernels.ladder_source import NotAKernelFile, UnknownKernel, find_kernels
from planish.kernels.triton_spec import Case, TritonSpec
from torch import Tensor
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "verify_a_kernel.py"


@pytest.fixture(scope="module")
def example() -> TritonSpec:
    (spec,) = find_kernels(str(EXAMPLE))
    return spec


def broken(folder: Path, old: str, new: str) -> Path:
    """A copy of the example with one place changed."""
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path = folder / "broken.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_the_example_climbs(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--rungs", "0-4", "--arch", "sm_80", "--json", str(report)]
    ended = CliRunner().invoke(cli.app, ["verify-kernel", str(EXAMPLE), *options])
    assert ended.exit_code == 0, ended.output
    told = json.loads(report.read_text())
    assert told["ok"]
    assert [(one["kernel"], one["rung"], one["status"]) for one in told["results"]] == [
        ("unit_rows", rung, "ok") for rung in range(5)
    ]
    outcomes = [outcome for one in told["results"] for outcome in one["outcomes"]]
    assert {outcome["status"] for outcome in outcomes} == {"ok"}
    assert [outcome["what"] for outcome in outcomes if outcome["rung"] == 1] == [
        "f32",
        "f16",
        "bf16",
    ]
    checked = [outcome["what"] for outcome in outcomes if outcome["rung"] == 0]
    assert checked[-2:] == ["torch.export of f32", "onnx of f32"]
    executed = [outcome["figures"] for outcome in outcomes if outcome["rung"] == 4]
    assert [figures["races"] for figures in executed] == [0, 0, 0]
    assert all(figures["instructions"] > 100 for figures in executed)


LOADED, STORED = ", other=0.0).to(tl.float32)", "out.to(OUT.dtype.element_ty), mask=at < columns)"
BROKEN = {
    "no mask": (
        1,
        f"mask=at < columns{LOADED}",
        f"mask=at < columns + 1{LOADED}",
        "f32: OutOfBounds: a load through X [5, 300] float32 leaves it: 1 of 301 active addresses",
    ),
    "squares in the working precision": (
        1,
        "tl.sum(x * x, axis=0)",
        "tl.sum((x.to(X.dtype.element_ty) * x.to(X.dtype.element_ty)).to(tl.float32), axis=0)",
        "f16: wrong by error ",
    ),
    "no cast": (
        1,
        LOADED,
        ", other=0.0)",
        "f16: InterpreterError: ValueError(\"Expected dtype ['fp32', 'fp64'] but got fp16\")",
    ),
    "not all is written": (
        1,
        STORED,
        STORED.replace("columns", "columns - 1"),
        "f32: 5 of 1500 elements are NaN or infinite, or should be: at (0, 299) nan for ",
    ),
    "what no GPU takes": (
        2,
        "tl.sum(x * x, axis=0)",
        "tl.sum(x * x, axis=0) + len(DTYPES) - 3",
        "DTYPES",
    ),
}
QUICK = ("no mask", "what no GPU takes")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BROKEN]
)
def test_a_broken_copy_stops_at_its_rung(name: str, tmp_path: Path) -> None:
    rung, old, new, sentence = BROKEN[name]
    (result,) = verify_kernels(str(broken(tmp_path, old, new)), [rung], ["sm_80"])
    assert result.status == "failed"
    assert sentence in result.sentence


def test_a_process_that_dies_is_a_failure_of_its_kernel(tmp_path: Path) -> None:
    path = broken(tmp_path, "return lambda generator: {", "return lambda generator: exit(3) or {")
    (result,) = verify_kernels(str(path), [1], ["sm_80"])
    assert (result.status, result.outcomes[0].what) == ("failed", "the process")
    assert "ended with code 3" in result.sentence


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["verify-kernel", str(tmp_path / "none.py")])
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error NotAKernelFile: there is no file ")
    ended = CliRunner().invoke(cli.app, ["verify-kernel", "gated", "--arch", "sm_81"])
    assert ended.exit_code == 2
    assert "unknown architecture 'sm_81'" in ended.stderr


def test_a_case_that_no_kernel_has_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [outcome("not run"), outcome("ok")]
    monkeypatch.setattr(kernel_ladder._Worker, "outcomes", lambda self: iter(found))
    assert verify_kernels("k", [1], case="case")[0].status == "ok"
    found.pop()
    assert verify_kernels("k", [1])[0].status == "not run"
    with pytest.raises(WrongOption, match="nothing on these rungs has 'bf61' in its name"):
        verify_kernels("k", [1], case="bf61")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "found: no SPEC"),
        ("SPEC = 3\n", "found: a SPEC of type int"),
        ("import no_such_module\n", "found: ModuleNotFoundError: No module named"),
        ("def (\n", "found: SyntaxError"),
    ],
)
def test_files_that_declare_no_kernel(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a_kernel.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(NotAKernelFile, match=message):
        find_kernels(str(path))


def test_a_file_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a_neighbour.py").write_text(
        "from planish.kernels.catalog import triton_kernels\nFOUND = triton_kernels()['gated']\n"
    )
    path = tmp_path / "a_kernel_of_two_files.py"
    path.write_text("from a_neighbour import FOUND as SPEC\n", encoding="utf-8")
    assert [spec.name for spec in find_kernels(str(path))] == ["gated"]


def test_kernels_are_found_by_name() -> None:
    assert [spec.name for spec in find_kernels("gated")] == ["gated"]
    assert {"gated", "norm"} <= {spec.name for spec in find_kernels("all")}
    with pytest.raises(UnknownKernel, match="did you mean gated"):
        find_kernels("gatd")


def test_rungs_are_read() -> None:
    assert parse_rungs("0-5") == (0, 1, 2, 3, 4, 5)
    assert parse_rungs("4, 1") == (1, 4)
    for wrong in ("6", "0-9", "a", "", "3-1", "-1"):
        with pytest.raises(WrongOption, match="does not name rungs"):
            parse_rungs(wrong)


def test_nothing_is_in_the_results_before_the_kernel_runs(example: TritonSpec) -> None:
    for case in example.cases:
        (out,) = plan_of(example, case, arguments_of(case), "sm_80").outputs
        assert out.isnan().all()


def test_a_kernel_that_writes_into_its_arguments_is_wrong(example: TritonSpec) -> None:
    case = example.cases[0]
    arguments = arguments_of(case)
    plan = plan_of(example, case, arguments, "sm_80")
    plan.outputs[0].copy_(example.twin(**arguments))
    assert judged(example, case, arguments, plan).right
    arguments["x"][0, 0] += 1
    judgement = judged(example, case, arguments, plan)
    assert not judgement.right
    assert judgement.sentence == "the kernel wrote into its argument x"


def outcome(status: str, what: str = "a case", rung: int = 1) -> Outcome:
    return Outcome("k", rung, what, status, f"sentence of {what}")  # type: ignore[arg-type]


def test_a_rung_is_what_was_tried_on_it() -> None:
    ok, failed, left = outcome("ok"), outcome("failed", "bad"), outcome("not run", "left")
    assert conclude("k", 1, [ok, ok]).sentence == "2 cases"
    mixed = conclude("k", 1, [ok, left])
    assert (mixed.status, mixed.sentence) == ("ok", "1 case; 1 not run, left: sentence of left")
    none = conclude("k", 1, [left])
    assert (none.status, none.sentence) == ("not run", "left: sentence of left")
    assert conclude("k", 1, []).status == "not run"
    worst = conclude("k", 1, [ok, failed, failed, left])
    assert (worst.status, worst.sentence) == ("failed", "bad: sentence of bad (and 1 more)")
    assert Outcome.from_json(json.loads(json.dumps(ok.to_json()))) == ok


def spec_of(example: TritonSpec, twin: object) -> TritonSpec:
    return dataclasses.replace(example, twin=twin)  # type: ignore[arg-type]


def right(spec: TritonSpec, have: Tensor, x: Tensor, unit: float = 0.0) -> bool:
    return judge(spec, Case("case", lambda generator: {"x": x}, unit=unit), {"x": x}, (have,)).right


def test_floats_are_judged_by_the_twins_own_rounding(example: TritonSpec) -> None:
    """A twin of one rounding: two roundings of the largest value, and twice its error, pass."""
    spec = spec_of(example, lambda x: x * x)
    x = torch.tensor([1.5, 1.0 + 2**-12, 0.25])  # the square of the second is not a float32
    twin, exact = x * x, x.double() * x.double()
    error = float((twin.double() - exact).abs().max())
    assert error > 0
    allowed = 2 * error + 2 * 2**-24 * 2.25
    assert right(spec, twin, x)
    for place in range(3):
        near, far = twin.clone(), twin.clone()
        near[place] = float(exact[place]) + 0.75 * allowed
        far[place] = float(exact[place]) + 1.5 * allowed
        assert right(spec, near, x) and not right(spec, far, x)
    off = twin.clone()
    off[0] = 2.25 * (1 + 2**-11)
    assert right(spec, off, x, unit=2**-11) and not right(spec, off, x, unit=2**-13)


def test_infinities_and_nan_are_where_they_belong(example: TritonSpec) -> None:
    spec = spec_of(example, lambda x: x * x)
    x = torch.tensor([1.0, 300.0, torch.nan, -2.0]).half()  # 90000 is infinite in float16
    twin = x * x
    assert twin.isinf()[1] and right(spec, twin, x)
    for place, wrong in ((0, torch.inf), (1, 6e4), (1, -torch.inf), (1, torch.nan), (2, 0.0)):
        have = twin.clone()
        have[place] = wrong
        assert not right(spec, have, x), (place, wrong)


def test_codes_may_differ_by_one_step_in_few_places(example: TritonSpec) -> None:
    spec = spec_of(example, lambda x: x.round().to(torch.int8))
    x = torch.arange(-100.0, 100.0).repeat(2)  # 400 codes: two may differ
    twin = x.to(torch.int8)
    for places, step, expected in ((2, 1, True), (3, 1, False), (1, 2, False), (0, 0, True)):
        have = twin.clone()
        have[:places] += step
        assert right(spec, have, x) is expected, (places, step)


def test_neighbouring_codes_of_fp8_are_one_step_apart(example: TritonSpec) -> None:
    """Across zero too, where the bits are far apart."""
    spec = spec_of(example, lambda x: x.to(torch.float8_e4m3fn))
    x = torch.zeros(400)
    x[0] = 1.0
    twin = x.to(torch.float8_e4m3fn)
    near, far, below = twin.float(), twin.float(), twin.float()
    near[0], far[0], below[1] = 1.125, 1.25, -(2.0**-9)
    for have, expected in ((near, True), (far, False), (below, True)):
        assert right(spec, have.to(torch.float8_e4m3fn), x) is expected


def test_integers_that_are_no_codes_are_equal(example: TritonSpec) -> None:
    for dtype in (torch.int32, torch.bool):
        spec = spec_of(example, lambda x, dtype=dtype: (x > 0).to(dtype))
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        twin = (x > 0).to(dtype)
        have = twin.clone()
        have[0] = 1 - int(have[0])
        assert right(spec, twin, x) and not right(spec, have, x)


def test_another_shape_or_dtype_is_wrong(example: TritonSpec) -> None:
    spec = spec_of(example, lambda x: x * 2)
    x = torch.ones(3, 5)
    assert right(spec, x * 2, x)
    assert not right(spec, (x * 2).T.contiguous(), x)
    assert not right(spec, (x * 2).half(), x)
    case = Case("case", lambda generator: {"x": x})
    assert judge(spec, case, {"x": x}, (x * 2, x)).sentence == "2 results where the twin has 1"


@pytest.mark.slow
def test_broken_copies_of_the_example_are_caught() -> None:
    (result,) = verify_kernels(str(EXAMPLE), [5], ["sm_80", "sm_90"])
    assert result.status == "ok", result.sentence
    assert len(result.outcomes) == 2


def test_asking_for_a_case() -> None:
    assert Ask(case="bf").wants("bf16 wide") and not Ask(case="bf").wants("f16")
