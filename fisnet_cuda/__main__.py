"""``python -m fisnet_cuda``: the command line, where the script ``fisnet-cuda`` is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
