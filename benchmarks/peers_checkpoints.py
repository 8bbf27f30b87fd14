"""Do the packages that checkpoints are written for compute what planish computes?

    python benchmarks/peers_checkpoints.py --peers VENV/bin/python [--model FOLDER_OR_GGUF]

Writes the model as compressed-tensors, GPTQ, AWQ and GGUF, loads each with its package
(transformers with compressed-tensors, GPTQModel, llama-cpp-python; what is not installed is
skipped) and compares the weights that the package unpacks, bit for bit, and the logits.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import planish
import torch
from planish.codegen.target import export_program
from planish.ir.example_inputs import example_inputs
from planish.ir.formats import parse_format
from planish.ir.program import Program
from planish.ir.read_gguf import gguf_folder
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.read_safetensors import read_safetensors
from planish.ir.weight_roles import weight_roles
from planish.ir.write_safetensors import planned, write_safetensors

_WORKER = Path(__file__).with_name("peers_checkpoints_worker.py")
_F16 = torch.float16
# target, format, options of the target, loaded by, dtype that it computes in
_CASES: list[tuple[str, str, dict[str, str], str, torch.dtype]] = [
    ("compressed-tensors", "int4-g64-sym-f16", {}, "transformers", torch.float32),
    ("compressed-tensors", "int4-g64-asym-f32", {}, "transformers, unpacked", torch.float32),
    (
        "compressed-tensors",
        "int8-channel-sym-f32",
        {"activations": "int8"},
        "transformers, unpacked",
        torch.float32,
    ),
    (
        "compressed-tensors",
        "fp8-e4m3-channel",
        {"activations": "fp8"},
        "transformers, unpacked",
        torch.float32,
    ),
    ("gptq", "int4-g64-sym-f16", {}, "gptqmodel", _F16),
    ("gptq", "int4-g64-asym-f16", {}, "gptqmodel", _F16),
    ("gptq", "int3-g64-asym-f16", {}, "gptqmodel", _F16),
    ("gptq", "int8-g64-sym-f16", {}, "gptqmodel", _F16),
    ("awq", "int4-g64-asym-f16", {}, "gptqmodel", _F16),
    # llama.cpp rounds activations to 8 bits where weights are blocks, and keeps keys and values
    # in float16: only the first of these is close, and shows that names and rows are right.
    ("gguf", "", {}, "llama-cpp", torch.float32),
    ("gguf", "int4-g32-sym-f16", {}, "llama-cpp", torch.float32),
    ("gguf", "int8-g32-sym-f16", {}, "llama-cpp", torch.float32),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True, help="a Python with the peers' packages")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", default="", help="run the cases whose target this is")
    given = parser.parse_args()
    cases = [case for case in _CASES if given.only in ("", case[0])]
    dense = {dtype: _captured(given.model, dtype) for dtype in {case[-1] for case in cases}}
    print("| target | format | loaded by | weights equal | largest logit | apart | top-1 |")
    print("|---|---|---|---|---|---|---|")
    for target, fmt, options, kind, dtype in cases:
        program = _quantized(dense[dtype], fmt)
        with tempfile.TemporaryDirectory() as place:
            folder = export_program(program, Path(place) / "model", target, options=options)
            told = _compare(program, folder, kind, given.peers)
        print(f"| {target} | {fmt or 'floats'} | {kind} | {told} |", flush=True)


def _captured(path: Path, dtype: torch.dtype) -> Program:
    folder = gguf_folder(path) if path.suffix == ".gguf" else path
    model = read_hf_folder(folder, dtype=dtype)
    program = planish.trace(model, (), example_inputs(model))
    program.metadata["origin"] = str(path.resolve())
    return program


def _compare(program: Program, folder: Path, kind: str, peers: str) -> str:
    """How many weights are equal bit for bit, the largest logit, the largest difference."""
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    asked, out = folder.parent / "ids", folder.parent / "out"
    write_safetensors(asked, {"ids": planned(ids)})
    command = [peers, str(_WORKER), kind, str(folder), str(asked), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["?"])[-1][:160] + " | | | "
    theirs = read_safetensors(out)
    names = [name for name in theirs if name != "logits"]
    same = 0
    for name in names:
        mine = program.weights[f"{name.removeprefix('weight:')}.weight"]
        same += torch.equal(theirs[name], mine.to(theirs[name].dtype))
    ours = program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    apart = (ours - theirs["logits"]).abs().max().item()
    top = (ours.argmax(-1) == theirs["logits"].argmax(-1)).float().mean().item()
    size = ours.abs().max().item()
    return f"{same} of {len(names)} | {size:.3f} | {apart:.2e} | {top:.3f}"


def _quantized(dense: Program, fmt: str) -> Program:
    """Every matrix product but those that share a table, rounded to nearest."""
    program = dense.copy()
    for role in weight_roles(program):
        if fmt and role.matmuls and not role.tables and role.axis is not None:
            weight = program.weights[role.name]
            program.weights[role.name] = parse_format(fmt).encode(weight, role.axis)
    return program


if __name__ == "__main__":
    main()
