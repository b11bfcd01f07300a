"""Numbers, shapes and weights computed while the model runs (``x.size(0)``, ``h // 2``, a weight norm): no relevance."""


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs = node.attrs
    b.emit_forward(index, "host", _call, (attrs["fn"], attrs["args"], attrs["kwargs"]))


def relevance(b, index, node, stream) -> None:
    """None flows through a number."""


def _call(fn, args, kwargs):
    return fn(*args, **dict(kwargs))
