"""`planish generate`: text from an exported decoder, as it comes.

The text goes to stdout as it is; what is told about it goes to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_print import check_json_target, err, speaking_plainly, working, write_json
from .ir.errors import WrongInput

if TYPE_CHECKING:
    from .generation import Generation
    from .generator import Generator, SamplingOptions
    from .speculate import Drafter


def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What planish export --kv-cache has written.")
    ],
    prompt: Annotated[str, typer.Argument(help="How the text begins.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="The most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens of this mass.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Only tokens this many times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the text become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text at which to end; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal texts.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as onnxruntime takes.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="PROMPT is a question in a conversation.")
    ] = False,
    ids: Annotated[
        bool, typer.Option("--ids", help="PROMPT is token ids (1,15,7), and so is the output.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="ngram|FOLDER",
            help="Check several guessed tokens at a time, the text staying the same: copied from "
            "the text itself, or by a smaller exported decoder.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.")
    ] = None,
) -> None:
    """Generate text with an exported decoder, in plain onnxruntime."""
    with speaking_plainly():
        check_json_target(json_file)
        from .generator import Generator

        with working(f"load {folder}"):
            generator = Generator(folder, threads=threads)
        sampling: SamplingOptions = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        if draft is not None:
            generator.drafter = _drafter(draft, sampling, threads)
            if warned := rounding_note(folder):
                err.print(warned, markup=False)
        stream = generator.stream(
            _prompt(generator, prompt, chat, ids),
            max_new_tokens=max_new_tokens,
            stop=stop or (),
            **sampling,
        )
        try:
            for piece in stream:
                _write(f"{piece.token} " if ids else piece.text)
        finally:
            stream.close()
            _write("\n")
        err.print(summary(stream.result), markup=False)
        if generator.statistics is not None:
            err.print(str(generator.statistics), markup=False)
        write_json(json_file, describe(stream.result))


def _drafter(draft: str, sampling: SamplingOptions, threads: int) -> Drafter:
    from .draft_model import ModelDrafter
    from .draft_ngram import NgramDrafter
    from .generator import Generator
    from .sampling import Sampling

    if draft == "ngram":
        return NgramDrafter()
    return ModelDrafter(Generator(draft, threads=threads).decoder, Sampling(**sampling))


def _write(text: str) -> None:
    """To stdout at once; who closes it, as `head` does, has read enough."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error


def rounding_note(folder: Path) -> str | None:
    """Why drafts may change a folder's text: tiny differences flip roundings to 8 bits."""
    from .codegen.bundle import MANIFEST
    from .tokenizer import read_json

    options: Any = read_json(folder / MANIFEST).get("target_options", {})
    if options.get("activations") != "int8":
        return None
    return (
        "note: this folder rounds activations to 8 bits, one token at a time slightly otherwise "
        "than several, so with --draft the text may differ; export without activations=int8 to "
        "keep it the same"
    )


def _prompt(generator: Generator, prompt: str, chat: bool, ids: bool) -> str | list[int]:
    if ids:
        try:
            return [int(token) for token in prompt.replace(",", " ").split()]
        except ValueError as error:
            raise WrongInput(
                "the prompt is not a list of token ids",
                expected="whole numbers with commas or spaces between",
                found=prompt,
                fix="leave out --ids for a prompt of text",
            ) from error
    if chat:
        return generator.chat_ids([{"role": "user", "content": prompt}])
    return prompt


_REASONS = {
    "end": "the model ended the text",
    "stop": "a stop string",
    "length": "--max-new-tokens",
    "context": "the model's context is full",
}


def summary(result: Generation) -> str:
    """One line: 7 prompt tokens, 310.2 tokens/s; 40 new tokens, 55.1 tokens/s; stopped by ..."""
    return (
        f"{result.prompt} prompt tokens, {result.prompt_tokens_per_second:.1f} tokens/s; "
        f"{len(result)} new tokens, {result.tokens_per_second:.1f} tokens/s; "
        f"stopped by: {_REASONS.get(result.stopped_by, result.stopped_by)}"
    )


def describe(result: Generation) -> dict[str, Any]:
    """A generation as plain data."""
    return {
        "ids": list(result),
        "text": result.text,
        "stopped_by": result.stopped_by,
        "prompt_tokens": result.prompt,
        "seconds": {"prompt": result.seconds[0], "decode": result.seconds[1]},
        "tokens_per_second": {
            "prompt": result.prompt_tokens_per_second,
            "decode": result.tokens_per_second,
        },
    }
