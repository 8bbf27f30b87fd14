"""The quantization_config of compressed-tensors checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def per_token(kind: str) -> dict[str, Any]:
    """Activations of 8 bits, int or float, with a scale a token found while running."""
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def quantization_config(
    form: str,
    groups: Sequence[tuple[Mapping[str, Any], list[str]]],
    activations: Mapping[str, Any] | None,
    dense: list[str],
) -> dict[str, Any]:
    """groups: weights' settings and the layers that have them; the most usual targets Linear."""
    usual = max(range(len(groups)), key=lambda number: len(groups[number][1]))
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if number == usual else paths,
                "weights": dict(weights),
                "input_activations": dict(activations) if activations else None,
                "output_activations": None,
                "format": form,
            }
            for number, (weights, paths) in enumerate(groups)
        },
        "ignore": dense,
        "kv_cache_scheme": None,
    }
