"""What can be checked of a GPU's path with the container's versions and no GPU: `make container-check`."""
