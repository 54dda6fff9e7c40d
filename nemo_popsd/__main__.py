"""`python -m nemo_popsd` is `popsd`."""

from __future__ import annotations

import sys

from nemo_popsd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
