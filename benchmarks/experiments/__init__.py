"""Experiments on real images: does a net trained as an ISNet ignore the background, at what cost, and when does it not?

One module a question, each one command, ``python -m benchmarks.experiments.<name>``; see README.md.
"""

from . import baselines as baselines  # registers its systems, whichever module a process begins with
