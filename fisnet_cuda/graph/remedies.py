"""Why an op is refused and what to do instead, in words."""

from __future__ import annotations

from typing import NamedTuple


class Remedy(NamedTuple):
    """Parts of an `UnsupportedModelError`: ``... is not supported (why). do``."""

    why: str
    do: str


_DEFAULT = Remedy(
    "it has no LRP rule here",
    "Replace it by a supported op (fisnet_cuda.supported() lists them), or wrap only the part of the model without it.",
)
_PRODUCT = "relevance through a product of two activations is not defined here"
_ATTENTION = Remedy("attention has no LRP rule here", "Use a network without attention.")
_LOGITS = Remedy(
    "at the end of a network the losses apply it themselves; inside, it is a gate or attention",
    "Return the logits, or use the network's variant without gates.",
)

# op names as torch.fx, torch.export and torch.nn spell them
_TABLE: tuple[tuple[str, Remedy], ...] = (
    ("mul", Remedy(f"{_PRODUCT}: gates, squeeze-and-excitation", "Use the network's variant without gates.")),
    ("matmul mm bmm baddbmm einsum dot", Remedy(f"{_PRODUCT}: attention", _ATTENTION.do)),
    (
        "scaled_dot_product_attention multi_head_attention_forward MultiheadAttention Transformer TransformerEncoder "
        "TransformerEncoderLayer TransformerDecoder TransformerDecoderLayer",
        _ATTENTION,
    ),
    (
        "softmax log_softmax softmin logsumexp Softmax Softmax2d LogSoftmax Softmin sigmoid logsigmoid hardsigmoid Sigmoid "
        "LogSigmoid Hardsigmoid",
        _LOGITS,
    ),
    (
        "gt lt ge le eq ne where masked_fill maximum minimum max min amax amin",
        Remedy("it chooses by value in a form that has no LRP rule here", "Use relu, clamp(min=0) or a max pool."),
    ),
    ("LSTM GRU RNN LSTMCell GRUCell RNNCell lstm gru", Remedy("recurrent layers have no LRP rule here", "Use convolutions.")),
    (
        "ConvTranspose1d ConvTranspose2d ConvTranspose3d conv_transpose1d conv_transpose2d conv_transpose3d",
        Remedy("transposed convolutions have no LRP rule here", "Use Upsample and a convolution."),
    ),
    (
        "setitem copy fill zero index_put index_copy scatter masked_scatter",
        Remedy("it rewrites part of a tensor", "Build the tensor with torch.cat or pad."),
    ),
    ("Embedding EmbeddingBag embedding", Remedy("indices carry no relevance", "Wrap only the part of the model behind it.")),
    ("SyncBatchNorm", Remedy("statistics across processes are not supported yet", "Use BatchNorm1d, 2d or 3d.")),
    (
        "wrap_with_set_grad_enabled wrap_with_autocast",
        Remedy(
            "forward switches gradients or autocast on or off, which a program of the whole network cannot follow",
            "Freeze layers with requires_grad_(False), and put autocast around the call.",
        ),
    ),
    ("detach", Remedy("it cuts the gradient but not the value", "Leave it out.")),
)
_BY_NAME = {name: entry for names, entry in _TABLE for name in names.split()}


def remedy(op: str) -> Remedy:
    """The reason and the way out for an op that has no rule.

    Example:
        >>> remedy("Softmax").do
        "Return the logits, or use the network's variant without gates."
    """
    return _BY_NAME.get(op, _DEFAULT)
