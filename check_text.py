"""What every way to generate refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

from .ir.errors import TextTooLong, WrongInput


def check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Raise WrongInput unless there are tokens, all of them of the vocabulary."""
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is None and len(tokens) > 0:
        return
    raise WrongInput(
        f"token id {wrong} is not in the model's vocabulary" if len(tokens) else "no tokens",
        expected=f"one or more ids from 0 to {vocabulary - 1}",
        found=str(wrong) if len(tokens) else "none",
        fix="use the tokenizer that belongs to the model",
    )


def check_length(length: int, more: int, context: int | None) -> None:
    """Raise TextTooLong unless `more` tokens fit after `length`."""
    if context is not None and length + more > context:
        raise TextTooLong(
            "the text does not fit into the model's context",
            expected=f"at most {context} tokens",
            found=f"{length} tokens and {more} more" if length else f"{more} tokens",
            fix="shorten the prompt, or ask for fewer new tokens",
        )
