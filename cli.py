"""The command line: one function a command; the longer ones have files of their own.

torch is imported by the commands that need it, so that `planish --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_bench import bench
from .cli_generate import generate
from .cli_print import INTERRUPTED, check_json_target, show, speaking_plainly, write_json
from .cli_search import search

app = typer.Typer(
    name="planish",
    help="Graph optimization passes that make transformer models smaller and faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.")
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="A Hugging Face folder, a saved program, a .gguf or a .pt2 file."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"planish {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Graph optimization passes that make transformer models smaller and faster."""


@app.command()
def export(
    source: Source,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "exact",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Change an option; repeatable."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="onnx, torch, triton, huggingface, gptq, awq, compressed-tensors or gguf."
        ),
    ] = "onnx",
    profile: Annotated[
        str | None, typer.Option(help="onnx: ort (the default) or standard.")
    ] = None,
    target_options: Annotated[
        list[str] | None,
        typer.Option(
            "--target-set",
            metavar="OPTION=VALUE",
            help="Change an option of the target; onnx: activations=int8 (faster, rounds more), "
            "logits=last (of a prompt only what generating reads), "
            "attention=mha (MultiHeadAttention where it fits).",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="sm_80,sm_90,...",
            help="triton: the GPUs to compile for, of sm_80, sm_89, sm_90, sm_100, sm_120, gfx942 "
            "and gfx1100 (short for --target-set arch=...).",
        ),
    ] = None,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache", help="Write a decoder that `planish generate` runs.")
    ] = False,
    keep_codes: Annotated[
        bool,
        typer.Option("--keep-codes", help="Keep a GGUF's weights in its formats, code by code."),
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="Merge a PEFT folder into the weights first; repeatable.",
        ),
    ] = None,
    target_shape: Annotated[
        str | None,
        typer.Option(
            "--target-shape",
            metavar="layers=24,heads=12,...",
            help="Cut the model to just this architecture, of layers, heads, kv_heads, ffn, hidden "
            "and experts (short for --set cut.shape=...; recipe exact becomes cut).",
        ),
    ] = None,
    verify: Annotated[str, typer.Option(help="structure, facts or numbers.")] = "facts",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A text file, or batches as .safetensors: 0.input_ids, 1.input_ids ...",
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(metavar="N", help="Slices of a calibration text.")
    ] = 128,
    calibration_length: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each slice of a calibration text.")
    ] = 512,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    json_file: Json = None,
) -> None:
    """Optimize a model and write it for a runtime."""
    with speaking_plainly():
        check_json_target(json_file)
        from .calibration import Slicing
        from .cli_export import export_model, plan_export
        from .cli_order import Order, parse_settings, shaped

        recipe, settings = shaped(recipe, parse_settings(options or []), target_shape)
        order = Order(
            source=source,
            out=out,
            recipe=recipe,
            options=settings,
            target=target,
            profile=profile,
            verify=verify,
            calibration=calibration,
            slicing=Slicing(calibration_samples, calibration_length),
            force=force,
            target_options=parse_settings(target_options or [], "--target-set")
            | ({"arch": arch} if arch is not None else {}),
            kv_cache=kv_cache,
            keep_codes=keep_codes,
            adapters=tuple(adapters or ()),
        )
        write_json(json_file, plan_export(order) if dry_run else export_model(order))


@app.command()
def explain(source: Source, json_file: Json = None) -> None:
    """Say what planish recognizes in a model, and why it leaves the rest alone.

    Given the folder of a recorded fault, replay the fault.
    """
    with speaking_plainly():
        check_json_target(json_file)
        from .cli_explain import explain_source

        write_json(json_file, explain_source(source))


@app.command()
def passes(json_file: Json = None) -> None:
    """List the passes with their options and contracts."""
    with speaking_plainly():
        check_json_target(json_file)
        from .cli_lists import list_passes

        write_json(json_file, list_passes())


@app.command()
def recipes(
    yaml: Annotated[
        str | None, typer.Option("--yaml", metavar="NAME", help="Print one recipe as YAML.")
    ] = None,
    json_file: Json = None,
) -> None:
    """List the recipes, or print one to start your own from."""
    with speaking_plainly():
        check_json_target(json_file)
        from .cli_lists import list_recipes
        from .recipes import find_recipe

        if yaml is not None:
            recipe = find_recipe(yaml)
            show(recipe.to_yaml().rstrip())
            write_json(json_file, {"name": recipe.name, "yaml": recipe.to_yaml()})
        else:
            write_json(json_file, list_recipes())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the exported folders stay.")] = (
        Path("planish-demo")
    ),
    recipes: Annotated[str, typer.Option(help="Comma-separated recipes.")] = "exact,int8,int4",
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    json_file: Json = None,
) -> None:
    """Optimize, export, run and compare two real models."""
    with speaking_plainly():
        check_json_target(json_file)
        from .demo import run_demo

        write_json(json_file, run_demo(out, [name.strip() for name in recipes.split(",")], force))


@app.command("verify-kernel")
def verify_kernel(
    kernel: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A python file that declares SPEC, a shipped kernel's name, or all.",
        ),
    ],
    rungs: Annotated[
        str, typer.Option(metavar="0-5", help="Which rungs to climb: 0-5, or 1,4.")
    ] = "0-5",
    arch: Annotated[
        str | None, typer.Option(metavar="sm_80,...", help="Architectures; all by default.")
    ] = None,
    case: Annotated[
        str, typer.Option(metavar="TEXT", help="Only cases and forms with TEXT in their name.")
    ] = "",
    json_file: Json = None,
) -> None:
    """Verify a Triton kernel without a GPU.

    Rung 0: the operation through torch.export and ONNX. 1: the kernel interpreted, every address
    checked. 2, 3: compiled for every architecture, within budgets. 4: its compiled code executed
    on the CPU. 5: broken copies of that code, which must be caught. Exit code 1: a rung failed.
    """
    with speaking_plainly():
        check_json_target(json_file)
        from .cli_verify_kernel import verify

        result = verify(kernel, rungs, arch, case)
        write_json(json_file, result)
    if not result["ok"]:
        raise typer.Exit(1)


app.command()(generate)
app.command()(search)
app.add_typer(bench, name="bench")


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that what was begun aside is removed


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
