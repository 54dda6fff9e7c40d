"""`python -m nemo_popsd` is `popsd`."""

from __future__ import annotations

import sys

from nemo_popsd.cli.main import main

# Guarded: saving a checkpoint starts a process that imports this module again.
if __name__ == "__main__":
    sys.exit(main())
