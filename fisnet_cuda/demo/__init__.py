"""``python -m fisnet_cuda.demo``: what ISNet training does, on real handwritten digits, in a few minutes.

Needs the extra ``demo`` (scikit-learn and matplotlib): ``pip install fisnet_cuda[demo]``.
"""
