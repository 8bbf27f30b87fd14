"""Example inputs for a model of which only the folder is known.

They follow from the names of forward's parameters and from sizes in the configuration, as every
architecture of the transformers library spells them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WrongInput

BATCH, LENGTH = 2, 16
_SEED = 0


def example_inputs(model: nn.Module, batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    """Keyword inputs to call and to capture a model with.

    Token ids int64[batch, length] with an all-ones mask, pixels f32[batch, channels, height,
    width], audio features f32[batch, bins, frames] or audio samples f32[batch, samples], and
    decoder ids for encoder-decoders; floats have the model's dtype. The values are seeded.
    Raises WrongInput if forward takes none of these.
    """
    config: Any = getattr(model, "config", None)
    taken = _required_names(model)
    random = torch.Generator().manual_seed(_SEED)
    inputs: dict[str, Tensor] = {}
    for name, make in _MAKERS.items():
        if name in taken:
            inputs[name] = make(config, batch, length, random)
    if not inputs:
        raise WrongInput(
            f"no example inputs can be derived for {type(model).__name__}",
            where="its forward method",
            expected=f"a parameter among {', '.join(_MAKERS)}",
            found=", ".join(inspect.signature(model.forward).parameters),
            fix="pass example inputs to planish.trace",
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _required_names(model: nn.Module) -> set[str]:
    """What forward must be given: its main input, what belongs to it, other modalities."""
    names = set(inspect.signature(model.forward).parameters)
    config: Any = getattr(model, "config", None)
    main = str(getattr(model, "main_input_name", "input_ids"))
    is_pair = bool(getattr(config, "is_encoder_decoder", False))
    contrastive = hasattr(config, "text_config") and hasattr(config, "projection_dim")
    wanted = {main}
    if main == "input_ids" or contrastive:
        wanted |= {"input_ids", "attention_mask"}
    if contrastive:
        wanted |= {"pixel_values"}
    if is_pair:
        wanted |= {"decoder_input_ids"}
    return names & wanted


def _size(config: Any, *names: str, part: str = "", default: int | None = None) -> Any:
    """The first of some settings that the configuration, or its part for a modality, has."""
    for place in (config, getattr(config, part, None) if part else None):
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                return value
    if default is not None:
        return default
    raise WrongInput(
        "the configuration does not say how large an input is",
        where=type(config).__name__,
        expected=f"one of {', '.join(names)}",
        fix="pass example inputs to planish.trace",
    )


def _token_ids(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(_size(text, "vocab_size"))
    special = [getattr(text, name, None) for name in ("pad_token_id", "eos_token_id")]
    ids = torch.randint(0, vocabulary, (batch, length), generator=random)
    free = next(i for i in range(vocabulary) if i not in special)
    for token in special:
        if isinstance(token, int):
            ids[ids == token] = free
    return ids


def _mask(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


def _decoder_ids(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    """Shorter than the encoder's, so that a capture does not take the lengths for equal."""
    return _token_ids(config, batch, max(2, length // 2 + 1), random)


def _pixels(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    size = _size(config, "image_size", part="vision_config", default=224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = int(_size(config, "num_channels", part="vision_config", default=3))
    return torch.randn(batch, channels, height, width, generator=random)


def _audio_features(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    """[batch, bins, frames] where the encoder takes one window of audio, else frames first."""
    window = getattr(config, "max_source_positions", None)
    if window is not None and hasattr(config, "num_mel_bins"):
        return torch.randn(batch, config.num_mel_bins, 2 * window, generator=random)
    bins = int(_size(config, "input_feat_per_channel", "feature_projection_input_dim", default=80))
    return torch.randn(batch, 8 * length, bins, generator=random)


def _audio_samples(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    return torch.randn(batch, 1000 * length, generator=random)


_MAKERS: dict[str, Callable[[Any, int, int, torch.Generator], Tensor]] = {
    "input_ids": _token_ids,
    "attention_mask": _mask,
    "pixel_values": _pixels,
    "input_features": _audio_features,
    "input_values": _audio_samples,
    "decoder_input_ids": _decoder_ids,
}
