"""The network's input: the relevance program ends there."""


def nonneg(b, node) -> bool:
    return False  # bounds are a matter of the z^B rule, not of the graph


def forward(b, index, node) -> None:
    """Nothing: the caller puts the input into the slot."""


def relevance(b, index, node, stream) -> None:
    """Nothing: `lower` reads the input's contributions."""
