"""Checks the GPU code with the container's versions, without a GPU: `make container-check`."""
