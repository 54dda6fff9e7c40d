"""What the fork server of `tests.harness` imports once, so that no rank has to: imports, nothing initialised."""

from __future__ import annotations

import contextlib
import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("torch", "torch.distributed", "pytest", "hypothesis", "megatron.core"):
        # Whatever keeps a package from importing here is the affair of the test that needs it.
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
