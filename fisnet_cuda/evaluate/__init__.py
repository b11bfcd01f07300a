"""What a trained classifier is worth, and what it looks at: metrics with confidence intervals by subset, background share of the
heatmaps, pointing game, insertion and deletion; as JSON, Markdown and a figure."""

from .faithfulness import Options
from .metrics import Classification, Estimate
from .report import Evaluation
from .results import Attention, Difference, Insertion, RunResult, SubsetResult, verdict
from .run import evaluate

__all__ = [
    "Attention", "Classification", "Difference", "Estimate", "Evaluation", "Insertion", "Options", "RunResult", "SubsetResult",
    "evaluate", "verdict",
]  # fmt: skip
