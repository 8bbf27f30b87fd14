"""Programs saved and loaded: the same text, the same bits; nothing trusted, nothing pickled."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build
import captured
import pytest
import torch
import zoo
from planish.ir.encoded import Encoded
from planish.ir.errors import (
    CorruptFile,
    OperatorRefused,
    OutputExists,
    PlanishError,
    SourceNotFound,
    TruncatedFile,
    UnknownFormat,
)
from planish.ir.formats import parse_format
from planish.ir.history import Applied, Declined, Measured, PassRecord
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.program_folder import GRAPH, WEIGHTS, load_program, save_program
from planish.ir.weights import Derived

CASES = [("llama", "sdpa"), ("bert", "eager"), ("mixtral", "sdpa"), ("t5", "eager")]


def same_results(a: Program, b: Program, inputs: list[Any]) -> bool:
    pairs = zip(run(a, inputs), run(b, inputs), strict=True)
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_save_and_load_is_the_identity(name: str, attention: zoo.Attention, tmp_path: Path) -> None:
    sample, program = captured.sample(name, attention), captured.captured(name, attention)
    loaded = load_program(save_program(program, tmp_path / "p"))
    assert str(loaded) == str(program)
    flat = program.flatten_inputs((), sample.other_inputs())
    assert same_results(loaded, program, flat)
    assert type(loaded(**sample.other_inputs())) is type(program(**sample.other_inputs()))
    assert loaded.facts == program.facts
    assert loaded.metadata == program.metadata
    assert loaded.weights.aliases == program.weights.aliases
    assert loaded.input_specs == program.input_specs
    modules = [(n.name, n.meta["module"]) for n in program.graph.nodes if n.op == "call_function"]
    assert modules == [
        (n.name, n.meta["module"]) for n in loaded.graph.nodes if n.op == "call_function"
    ]
    for mine, theirs in zip(loaded.examples, program.examples, strict=True):
        assert torch.equal(mine, theirs)
    again = save_program(loaded, tmp_path / "again")
    assert (again / GRAPH).stat().st_size == pytest.approx(
        (tmp_path / "p" / GRAPH).stat().st_size, rel=0.01
    )


@pytest.mark.parametrize(("name", "attention"), CASES[:2])
def test_free_axes_stay_free(name: str, attention: zoo.Attention, tmp_path: Path) -> None:
    sample, program = captured.sample(name, attention), captured.captured(name, attention)
    loaded = load_program(save_program(program, tmp_path / "p"))
    free = [str(node.meta["val"].shape) for node in loaded.inputs]
    assert all(spec.shape == (None, None) for spec in loaded.input_specs), free
    last = loaded.results[0].meta["val"]
    assert [isinstance(size, int) for size in last.shape] == [False, False, True]
    for batch, length in ((1, 5), (4, 31)):
        inputs = program.flatten_inputs((), sample.other_inputs(batch, length))
        assert same_results(loaded, program, inputs)


@pytest.fixture
def small() -> Program:
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def body(x: Any, w: Any) -> Any:
        y = op.linear(x, w)
        y = op.clamp(y, -math.inf, 2.5)
        y = op._to_copy(y, dtype=torch.float64, memory_format=torch.contiguous_format)
        return op.sym_size.int(x, 0), op.to.dtype(y, torch.float32)

    program = build.program(body, {"x": x}, {"w": weight})
    program.weights.aliases["tied"] = "w"
    return program


def test_constants_keep_their_types(small: Program, tmp_path: Path) -> None:
    loaded = load_program(save_program(small, tmp_path / "p"))
    assert str(loaded) == str(small)
    assert "clamp" in str(small)
    for mine, theirs in zip(loaded.graph.nodes, small.graph.nodes, strict=True):
        assert str(mine.args) == str(theirs.args)
        kinds = [(type(a), type(b)) for a, b in zip(mine.args, theirs.args, strict=True)]
        assert all(a is b for a, b in kinds if a is not torch.fx.Node)
        assert {k: v for k, v in mine.kwargs.items() if not isinstance(v, torch.fx.Node)} == {
            k: v for k, v in theirs.kwargs.items() if not isinstance(v, torch.fx.Node)
        }


@pytest.mark.parametrize(
    "name", ["int4-g4-sym", "int8-channel-asym-f32", "int3-g32-asym-f16", "int2-channel-sym"]
)
def test_encoded_weights_keep_format_and_bits(small: Program, name: str, tmp_path: Path) -> None:
    small.weights["w"] = parse_format(name).encode(small.weights["w"])
    loaded = load_program(save_program(small, tmp_path / "p"))
    entry = loaded.weights.entry("w")
    assert isinstance(entry, Encoded)
    assert entry == small.weights.entry("w")
    assert loaded.weights.entry("tied") is entry
    assert loaded.nbytes() == small.nbytes()
    assert same_results(loaded, small, list(small.examples))


def test_derived_weights_are_computed_once_written(small: Program, tmp_path: Path) -> None:
    rows = small.weights["w"]
    small.weights["w"] = Derived((rows[:3], rows[3:]), lambda a, b: torch.cat((b, a)), rows.shape,
                                 rows.dtype, "stacked")  # fmt: skip
    loaded = load_program(save_program(small, tmp_path / "p"))
    assert torch.equal(loaded.weights["w"], torch.cat((rows[3:], rows[:3])))
    assert isinstance(loaded.weights.entry("w"), torch.Tensor)


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    big = torch.zeros(3000, 1001)
    program = build.program(op.linear, {"x": torch.randn(2, 1001)}, {"w": big})
    loaded = load_program(save_program(program, tmp_path / "p"))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see mappings")
    assert str(tmp_path / "p" / WEIGHTS) in maps.read_text()
    assert torch.equal(loaded.weights["w"], big)


def test_history_survives(small: Program, tmp_path: Path) -> None:
    record = PassRecord("quantize", {"bits": 4, "dtype": torch.float16, "x": None}, "lossy", 0.5)
    record.applied.append(Applied(1, "round", "w", "w", "", "note"))
    record.declined.append(Declined("round", "v", "m", "too small"))
    record.measured.append(Measured("SQNR (dB)", math.inf, 21.5, 20.0, "w"))
    record.rolled_back.append(Applied(2, "round", "u", "u", "m"))
    record.nodes, record.nbytes = (9, 8), (100, 40)
    small.history.records.append(record)
    loaded = load_program(save_program(small, tmp_path / "p"))
    assert loaded.history.records == [record]
    assert str(loaded.history) == str(small.history)


def test_an_existing_folder_is_kept(small: Program, tmp_path: Path) -> None:
    save_program(small, tmp_path / "p")
    with pytest.raises(OutputExists, match="exists"):
        save_program(small, tmp_path / "p")
    save_program(small, tmp_path / "p", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_program_that_cannot_be_saved_leaves_nothing(small: Program, tmp_path: Path) -> None:
    small.results[0].target = torch.add
    with pytest.raises(OperatorRefused, match="cannot hold the operator"):
        save_program(small, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    form = json.loads((folder / GRAPH).read_text())
    change(form)
    (folder / GRAPH).write_text(json.dumps(form))


def call(form: dict[str, Any], name: str) -> dict[str, Any]:
    return next(n for n in form["nodes"] if name in n.get("target", ""))


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "aten::from_file.default", "aten::add_.Tensor", "x::y.z",
        "aten::linear.no_such", "aten::__class__.default", "operator.attrgetter",
        "prim::PythonOp.default", "math.__loader__", "aten::linear", "", None, 3,
    ],
)  # fmt: skip
def test_operators_outside_the_list_are_refused(
    small: Program, target: Any, tmp_path: Path
) -> None:
    folder = save_program(small, tmp_path / "p")
    edited(folder, lambda form: call(form, "clamp").update(target=target))
    with pytest.raises(OperatorRefused, match="cannot hold the operator") as raised:
        load_program(folder)
    assert "%clamp" in raised.value.where


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.pop("nodes"),
        lambda f: f.pop("weights"),
        lambda f: f["nodes"].pop(),
        lambda f: f.update(nodes=[]),
        lambda f: f.update(nodes=[3]),
        lambda f: f.update(planish_program=99),
        lambda f: f["nodes"].insert(0, f["nodes"][-2]),
        lambda f: f["nodes"].append(f["nodes"][-1]),
        lambda f: call(f, "clamp")["args"].__setitem__(0, {"node": "gone"}),
        lambda f: call(f, "clamp")["args"].__setitem__(0, {"dtype": "nn"}),
        lambda f: call(f, "clamp")["args"].__setitem__(0, {"one": 1, "two": 2}),
        lambda f: call(f, "clamp").update(args=[]),
        lambda f: call(f, "clamp").update(name="not a name"),
        lambda f: call(f, "clamp").update(op="call_module"),
        lambda f: call(f, "clamp").update(source=99),
        lambda f: call(f, "linear")["args"].append(2),
        lambda f: f["nodes"][0]["value"].update(shape=["s0", "s9"]),
        lambda f: f["nodes"][0]["value"].update(shape=["s0", -6]),
        lambda f: f["nodes"][0]["value"].update(dtype="save"),
        lambda f: f.update(free_axes={"s0": "2"}),
        lambda f: f.update(in_spec={"type": "builtins.tuple", "context": "null"}),
        lambda f: f.update(out_spec={"type": None, "context": None, "children_spec": []}),
        lambda f: f.update(history=[{"name": "x"}]),
        lambda f: f["weights"].update(w={"format": "int4-g4-sym"}),
        lambda f: f["weights"].update(v={}),
        lambda f: f.update(weights={}),
    ],
)  # fmt: skip
def test_damaged_graphs_are_told(
    small: Program, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    folder = save_program(small, tmp_path / "p")
    edited(folder, change)
    with pytest.raises(PlanishError) as raised:
        load_program(folder)
    assert raised.value.where
    assert raised.value.fix


def test_other_damage_is_told(small: Program, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="holds no saved program"):
        load_program(tmp_path / "nothing")
    folder = save_program(small, tmp_path / "p")
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[:-8])
    with pytest.raises(TruncatedFile):
        load_program(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(SourceNotFound):
        load_program(folder)
    (folder / GRAPH).write_text("{")
    with pytest.raises(CorruptFile, match="is not JSON"):
        load_program(folder)


def test_damaged_encoded_weights_are_told(small: Program, tmp_path: Path) -> None:
    small.weights["w"] = parse_format("int4-g4-sym").encode(small.weights["w"])
    whole = save_program(small, tmp_path / "p")
    changes: list[tuple[dict[str, Any], type[PlanishError]]] = [
        ({"format": "int99"}, UnknownFormat),
        ({"shape": [8, 6]}, CorruptFile),
        ({"shape": [7, 9]}, PlanishError),
        ({"parts": {"codes": "w:codes"}}, CorruptFile),
        ({"dtype": "import"}, CorruptFile),
    ]
    for place, (change, kind) in enumerate(changes):
        folder = tmp_path / str(place)
        shutil.copytree(whole, folder)
        edited(folder, lambda form, change=change: form["weights"]["w"].update(change))
        with pytest.raises(kind):
            load_program(folder).weights["w"]


def test_unknown_containers_become_plain_ones(small: Program, tmp_path: Path) -> None:
    """No class and no module is imported because a file names it."""
    folder = save_program(small, tmp_path / "p")
    leaf = {"type": None, "context": None, "children_spec": []}
    for kind, context, found in (
        ("evil.Output", '["size", "y"]', dict),
        ("evil.Output", '{"a": 1}', tuple),
        ("collections.defaultdict", '{"default_factory_module": "evil"}', tuple),
        ("builtins.list", '{"__enum__": true, "fqn": "evil:E"}', tuple),
    ):
        spec = {"type": kind, "context": context, "children_spec": [leaf, leaf]}
        edited(folder, lambda form, spec=spec: form.update(out_spec=spec))
        loaded = load_program(folder)
        assert type(loaded(*small.examples)) is found
        assert "plain container" in loaded.metadata["notes"][-1]
