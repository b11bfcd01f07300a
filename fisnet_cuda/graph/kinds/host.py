"""Numbers and shapes computed while the model runs (``x.size(0)``, ``h // 2``): no relevance."""


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    b.emit_forward(index, "host", node.attrs["fn"], node.attrs["args"])


def relevance(b, index, node, stream) -> None:
    """None flows through a number."""
