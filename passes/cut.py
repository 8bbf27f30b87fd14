"""Cut layers, experts, heads, FFN channels and residual width out of a program: it gets smaller.

Before: `%g = linear(%x, %G) : f32[.., 80]`. After: `%g = linear(%x, %G) : f32[.., 64]`, with the
rows of `%G` and the columns that read them gone, and every size that follows. What goes together is
found by axis flow: a gate's row with the up row and the down column; a key head with its value head
and all query heads that read it. The result equals, in float64, the program with those weights set
to 0, which is checked before anything is kept.
Structured pruning as in LLM-Pruner (Ma et al. 2023, sec. 3.1), with groups from the data flow;
how much goes: by shares, to a budget (`cut_budget`) or to a target shape (`target_shape`); what
goes: by importance (`unit_importance`) or learned gates (`learned_gates`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import WrongOrder
from ..ir.program import Program
from .contract import Context, Pass, contract
from .cut_options import check_options
from .cut_plan import CutPlan


@dataclass(frozen=True)
class Cut(Pass):
    """Remove shares of layers and units, the least important of each place.

    ffn, heads, width: what share of the FFN channels of each layer, of the head groups of each
    attention, of the channels of the residual stream goes; at least one stays. queries: of the
    query heads of each key head. embedding: of the channels of tables that a product widens or
    narrows to the stream. experts: of each routed layer. layers, attention_layers, mlp_layers: of
    whole layers, or of their attention or MLP branches. shape: instead of shares, what shall be
    left, as "layers=24,heads=12,kv_heads=4,ffn=2048,hidden=640,experts=4".
    budget: what part of the parameters, FLOPs or measured latency (`measure`) of the whole program
    goes; the shares then say which kinds may go and in what proportion (without: ffn and heads).
    importance: magnitude; wanda, taylor, fisher or learned, which take calibration batches.
    scope: "uniform", the same share in each place, or "global", units of a kind compete over all.
    multiple: what the numbers of FFN, width and embedding channels that stay are multiples of
    (kernels like 8 to 64). reconstruct: solve what reads the cut channels anew by least squares on
    the calibration batches. norms: "kept" divides by the number of channels before the cut, which
    keeps the function; "own" by what is left; "auto" is "kept", but "own" where a target shape
    narrows LayerNorms, whose kept form no architecture has. Raises WrongOption, WrongOrder,
    CannotCut, CannotReach, BudgetNotReached, CannotCutLayers.
    """

    ffn: float = 0.0
    heads: float = 0.0
    width: float = 0.0
    queries: float = 0.0
    embedding: float = 0.0
    experts: float = 0.0
    layers: float = 0.0
    attention_layers: float = 0.0
    mlp_layers: float = 0.0
    shape: str = ""
    budget: float | None = None
    measure: str = "parameters"
    importance: str = "magnitude"
    scope: str = "uniform"
    multiple: int = 1
    reconstruct: bool = False
    norms: str = "auto"

    contract = contract("lossy", requires=["raised", "dense_weights"], min_sqnr=-200.0)

    def __post_init__(self) -> None:
        check_options(self.options())

    def run(self, program: Program, context: Context) -> None:
        if (self.reconstruct or self.importance != "magnitude") and not context.calibration:
            raise WrongOrder(
                "cut needs calibration batches for reconstruct=true and every importance but "
                "magnitude",
                fix="pass calibration=[(ids,), ...] with a few representative inputs",
            )
        CutPlan(self.options(), program, context, self.contract.growth).run()
