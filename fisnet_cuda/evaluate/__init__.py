"""What a trained classifier is worth, and what it looks at: metrics with confidence intervals by subset, background share of the
heatmaps, pointing game, insertion and deletion, background swap; as JSON, Markdown and a figure."""

from .faithfulness import Options
from .metrics import Classification, Estimate
from .report import Evaluation
from .results import Attention, Difference, Insertion, RunResult, SubsetResult, verdict
from .run import evaluate
from .swap import BackgroundSwap, background_swap, choose_donors, fill_foreground, swap_backgrounds

__all__ = [
    "Attention", "BackgroundSwap", "Classification", "Difference", "Estimate", "Evaluation", "Insertion", "Options", "RunResult",
    "SubsetResult", "background_swap", "choose_donors", "evaluate", "fill_foreground", "swap_backgrounds", "verdict",
]  # fmt: skip
