"""Why nothing of a kind may be cut: which weight, and which other use of it forbids the cut."""

from __future__ import annotations

import numpy as np

from ..ir.channel_map import ChannelMap
from ..ir.prunable_units import Kind

_WORDS: dict[str, str] = {
    "heads": "no attention with several heads was found",
    "queries": "no key head with several query heads was found",
    "ffn": "no product was found whose channels another product reads",
    "width": "no stream was found that starts at a table, which products write and read",
    "embedding": "no table was found whose channels only products read",
}


def why_no_units(channels: ChannelMap, kind: Kind) -> str:
    """One sentence."""
    attended = channels.attended
    read = {int(root) for key in channels.absorbs for root in np.unique(channels.axes[key])}
    for (name, axis), made in channels.produces.items():
        roots = [int(root) for root in np.unique(channels.axes[name, axis]) if root]
        ours = {
            "width": made in ("table", "norm"),
            "embedding": made == "table",
            "ffn": made == "product" and read >= set(roots) and not attended & set(roots),
        }.get(kind, made == "product" and bool(attended & set(roots)))
        blocked = next((root for root in roots if root in channels.blocked), None)
        if ours and blocked is not None:
            return f"{name} cannot lose channels: {channels.blocked[blocked]}"
    return _WORDS.get(kind, f"no {kind} were found")


__all__ = ["why_no_units"]
