"""A digest of a model's base weights, with which tests verify that the weights did not change."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def base_digest(model: nn.Module) -> str:
    """SHA-256 of this rank's parameters without adapters, by name and bits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".adapter." not in name:
            digest.update(name.replace(".to_wrap", "").encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
