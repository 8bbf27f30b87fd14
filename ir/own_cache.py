"""Capturing a model without the cache that it keeps itself.

A model whose configuration says `use_cache` returns its keys and values in an object that no graph
can hold. The program shall not have that cache (`insert_kv_cache` makes its own), so it is switched
off while the model is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn


@contextlib.contextmanager
def without_own_cache(model: nn.Module) -> Generator[bool]:
    """Inside, no configuration of the model or its parts asks for a cache; yields if one did."""
    switched: list[Any] = []
    for module in model.modules():
        for config in _configurations(getattr(module, "config", None)):
            if getattr(config, "use_cache", False) is True:
                config.use_cache = False
                switched.append(config)
    try:
        yield bool(switched)
    finally:
        for config in switched:
            config.use_cache = True


def _configurations(config: Any) -> list[Any]:
    """A configuration and those of the modalities inside it."""
    if config is None:
        return []
    inner = [getattr(config, name, None) for name in ("text_config", "decoder", "encoder")]
    return [config, *(part for part in inner if part is not None and not isinstance(part, str))]
