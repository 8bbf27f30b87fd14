"""The benchmark's protocol: what rows cost, what is measured again, what the table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import planish.bench_worker as worker
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from planish import bench_planish
from planish.bench_limits import share
from planish.bench_measures import MEASURES, MIXED, QUICK, Measure, sentences
from planish.bench_model import Asked, bench_model, read_model
from planish.bench_process import Cannot, ask_once, launch
from planish.bench_results import Results
from planish.bench_roster import BenchModel, Contestant, contestants
from planish.bench_table import markdown, speed
from planish.cli import app
from planish.ir.errors import SourceNotFound, UnknownName, WrongOption
from typer.testing import CliRunner

LIMITS = {"read": {"1000": 1e9, "1000000": 1e8}, "float32": 1e10, "int8": 1e11}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=131,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_is_counted_from_its_tensors(tiny: Path) -> None:
    model = BenchModel.read("tiny", "decoder", tiny)
    attention = 48 * 48 + 2 * 24 * 48 + 48 * 48  # q, k and v, o: 4 heads of 12, 2 for keys
    assert model.matmul == 2 * (attention + 3 * 48 * 80)
    assert model.table == 131 * 48
    assert model.cache == 2 * 2 * 2 * 12
    assert model.parameters == model.matmul + model.table + 5 * 48


def test_the_least_cost_of_a_round(tiny: Path) -> None:
    model = BenchModel.read("tiny", "decoder", tiny)
    row = Contestant("int8", "decoder", "m", bits=9, head_bits=8, cache_bits=16)
    decode = Measure("decode", "decoder", prompt=100, batch=4, new=3)
    nbytes, operations = decode.cost(model, row)
    weights = model.matmul * 9 / 8 + model.table
    assert nbytes == 3 * (weights + 2 * model.cache * 4 * 100)
    assert operations == 2 * 3 * 4 * (model.matmul + model.table)
    prefill = Measure("prefill", "decoder", prompt=100)
    assert prefill.cost(model, row) == (weights, 2.0 * (100 * model.matmul + model.table))


def test_a_share_of_the_limit_names_what_binds() -> None:
    assert share(LIMITS, (1e3, 1.0), 1, "float32", 2e-6) == (pytest.approx(0.5), "memory")
    assert share(LIMITS, (1.0, 1e10), 1, "float32", 4.0) == (pytest.approx(0.25), "arithmetic")
    assert share(LIMITS, (1.0, 1e10), 1, "int8", 0.4) == (pytest.approx(0.25), "arithmetic")


@given(st.integers(1, 10**9))
def test_bandwidth_lies_between_the_measured_ones(size: int) -> None:
    found, bound = share(LIMITS, (float(size), 0.0), 1, "float32", 1.0)
    assert bound == "memory"
    assert size / 1e9 * (1 - 1e-9) <= found <= size / 1e8 * (1 + 1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 50))
def test_sentences_have_their_lengths(lengths: list[int], words: int) -> None:
    found = sentences(list(range(words)), lengths)
    assert [len(each) for each in found] == lengths
    ids, mask = worker.padded(found)
    assert mask.sum(1).tolist() == lengths
    assert [ids[i, : len(s)].tolist() for i, s in enumerate(found)] == found


def test_measures_have_names_of_their_own() -> None:
    for measures in (MEASURES, QUICK):
        names = [measure.name for measure in measures]
        assert len(set(names)) == len(names)
    assert min(MIXED) >= 8 and max(MIXED) <= 128 and len(set(MIXED)) > 16


def test_quality_of_the_reference_itself(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(70, 11)).astype(np.float32)
    ids = [i % 11 for i in range(70)]
    order: dict[str, Any] = {"file": str(tmp_path / "r.npy"), "write": True}
    same = worker.quality(logits, ids, order)
    assert same["kl"] == 0 and same["top1"] == 1
    other = worker.quality(np.roll(logits, 1, 0), ids, order | {"write": False})
    assert other["kl"] > 0.1 and other["top1"] < 0.5
    exact = torch.from_numpy(logits).double().log_softmax(-1)
    wanted = -exact[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).mean()
    # each of the 69 terms is rounded to float32 below 16
    assert same["nll"] == pytest.approx(float(wanted), abs=16 * 2**-24)


def test_results_are_found_again_and_replaced(tmp_path: Path) -> None:
    results = Results(tmp_path / "deep" / "r.jsonl")
    results.add("speed", model="m", contestant="a", key="1", threads=1, measure="x", walls=[1])
    results.add("speed", model="m", contestant="a", key="1", threads=1, measure="x", walls=[2])
    again = Results(results.file)
    about = {"model": "m", "contestant": "a", "key": "1", "threads": 1, "measure": "x"}
    found = again.get("speed", **about)
    assert found is not None and found["walls"] == [2]
    assert again.get("speed", **about | {"key": "2"}) is None
    assert len(again.all("speed")) == 1


def test_what_is_done_after_all_is_not_told_to_be_impossible(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    who = {"model": "m", "contestant": "a"}
    about = {**who, "key": "1", "threads": 1}
    results.add("cannot", **who, measure="everything", why="no such package")
    results.add("cannot", **about, measure="loading", why="no memory")
    results.add("cannot", **{**about, "threads": None}, measure="quality", why="slow")
    results.add("cannot", **about, measure="prefill", why="slow")
    results.add("cannot", **about, measure="decode", why="slow")
    results.add("prepared", **who, key="1")
    results.add("loaded", **about, load=1.0)
    results.add("quality", **about | {"threads": None}, kl=0.0)
    results.add("speed", **about, measure="prefill", walls=[1.0])
    for found in (results, Results(results.file)):
        assert [r["measure"] for r in found.all("cannot")] == ["decode"]


def _row(results: Results, name: str, walls: list[float], kl: float) -> None:
    about = {"model": "m", "contestant": name, "key": "k"}
    cost = {"seconds": 1.0, "peak": 1e6}
    results.add("prepared", **about, size=2e6, cost=cost, heat="float32", compute="float32")
    told = {"walls": walls, "base": [1.0, 1.0, 1.0], "work": 10, "unit": "tokens/s", "first": 3.0}
    more = {"calls": 1, "bytes": 1e7, "operations": 1.0, "compute": "float32"}
    results.add("speed", **about, threads=1, measure="prefill", **told, **more)
    results.add("quality", **about, threads=None, kl=kl, top1=1.0, perplexity=9.0)


def test_the_table_marks_worse_and_beaten_rows(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.add("limits", threads=1, **LIMITS)
    _row(results, "eager", [1.0, 1.0, 1.0], 0.0)
    _row(results, "good", [0.5, 0.4, 0.5], 1e-6)
    _row(results, "coarse", [0.25, 0.25, 0.25], 0.2)
    about = {"model": "m", "contestant": "odd", "measure": "everything"}
    results.add("cannot", **about, why="needs | a GPU")
    text = markdown(results)
    assert "| eager | 10.0 ±0% · 1.00× · 10%m ‡ |" in text
    assert "| good | 20.0 ±6% · 2.00× · 20%m |" in text
    assert "| coarse † | 40.0 ±0% · 4.00× · 40%m |" in text
    assert r"| m | odd | everything | needs \| a GPU |" in text


def test_targets_are_against_peers_that_are_no_better(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "benchmarks" / "targets.py"
    targets = worker.load_module(str(file))
    results = Results(tmp_path / "r.jsonl")
    results.add("limits", threads=1, **LIMITS)
    made = {"peer fast": ([0.4], 0.3), "peer fine": ([0.5], 0.01), "planish a": ([0.3], 0.02)}
    for name, (walls, kl) in {"eager": ([1.0], 0.0), **made}.items():
        _row(results, name, walls, kl)
    goal = targets.Target("m", "prefill", "float32", 1.2, ("peer fast",))
    told = targets._row(goal, 1, results)
    assert told[1:] == ["1", "planish a", "peer fast", "1.33", "33% (memory)", "reached"]
    goal = targets.Target("m", "prefill", "float32", 1.2, ("peer fast", "peer fine"))
    assert targets._row(goal, 1, results)[2:4] == ["none as good", "peer fine"]
    _row(results, "planish b", [0.49], 0.0)
    assert targets._row(goal, 1, results)[3:5] == ["peer fine", "1.02"]


def test_milliseconds_are_better_when_fewer() -> None:
    told = {"walls": [0.2], "base": [0.6], "work": 1, "unit": "ms", "calls": 1, "bytes": 1.0}
    found = speed({**told, "operations": 1.0, "compute": "float32"}, LIMITS)
    assert (found.value, found.ratio) == (pytest.approx(200.0), pytest.approx(3.0))


def test_who_cannot_says_why(tmp_path: Path) -> None:
    file = tmp_path / "odd.py"
    file.write_text(
        "IMPORTS = []\nPACKAGES = ['no-such-package']\nCONTESTANTS = []\n"
        "def prepare(options, model, out):\n    raise RuntimeError('no such device\\nreally')\n"
        "def load(options, model, path, threads):\n    import os\n    os._exit(3)\n"
    )
    with pytest.raises(Cannot, match="no-such-package is not installed"):
        ask_once(sys.executable, {"do": "versions", "module": str(file)}, 60)
    order = {"module": str(file), "options": {}, "model": {}, "out": str(tmp_path)}
    with pytest.raises(Cannot, match=r"^RuntimeError: no such device$"):
        ask_once(sys.executable, {"do": "prepare", **order}, 60)
    served = launch(sys.executable, {"do": "serve", **order, "path": ".", "threads": 1})
    with pytest.raises(Cannot, match="the process ended with 3"):
        served.answer(60)
    served.close()


def test_texts_of_a_batch_are_decoded_as_each_alone(tiny: Path, tmp_path: Path) -> None:
    options = {"recipe": "exact", "target": "onnx"}
    told = BenchModel.read("tiny", "decoder", tiny).told()
    facts = bench_planish.prepare(options, told, tmp_path)
    assert facts == {"bits": 32, "head_bits": 32}
    engine = bench_planish.load(options, told, tmp_path, 1)
    ids = np.random.default_rng(0).integers(0, 131, (3, 9))

    def decoded(rows: Any) -> Any:
        found = [engine.start(rows)]
        for _ in range(4):
            found.append(engine.step(found[-1]))
        return np.stack(found, 1)

    apart = [decoded(ids[i : i + 1])[0] for i in range(3)]
    assert np.array_equal(decoded(ids), np.stack(apart))


def test_every_contestant_is_declared_in_full() -> None:
    peers = Path(__file__).parents[1] / "benchmarks" / "contestants"
    for kind in ("decoder", "encoder"):
        rows = contestants(kind, peers)
        assert rows[0].name == "eager"
        assert len({row.slug for row in rows}) == len(rows)
        assert {row.name.split()[0] for row in rows} >= {"Inductor", "onnxruntime", "planish"}


def test_the_whole_path_on_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    results = Results(tmp_path / "bench.jsonl")
    results.add("limits", threads=1, **LIMITS)  # measuring them is not what is tested
    heard: list[str] = []
    text = bench_model(Asked(tiny, rounds=2, out=tmp_path), heard.append)
    assert "planish exact onnx" in text and "eager" in text and "What could not run" not in text
    assert (tmp_path / "tiny-1-threads.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    quality = {r["contestant"]: r["kl"] for r in lines if r["record"] == "quality"}
    assert quality["eager"] == 0 and quality["planish exact onnx"] < 1e-6
    speeds = [r for r in lines if r["record"] == "speed"]
    assert len(speeds) == 4 and all(len(r["walls"]) == 2 for r in speeds)


def test_bad_orders_are_said_before_anything_runs(tiny: Path, tmp_path: Path) -> None:
    def hear(what: str) -> None:
        raise AssertionError(what)

    with pytest.raises(UnknownName, match="unknown name 'Inducter'"):
        bench_model(Asked(tiny, against=("Inducter",)), hear)
    with pytest.raises(UnknownName, match="'metal'"):
        bench_model(Asked(tiny, targets=("metal",)), hear)
    with pytest.raises(WrongOption):
        bench_model(Asked(tiny, rounds=0), hear)
    with pytest.raises(SourceNotFound, match=r"expected: config\.json"):
        read_model(tmp_path)


def test_the_command_takes_a_model_without_naming_itself(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["bench", str(tmp_path / "missing")])
    assert ended.exit_code != 0
    assert "there is no such model" in ended.output
    assert "--recipe" in CliRunner().invoke(app, ["bench", "model", "--help"]).output
