"""Purified On-Policy Self-Distillation of long-reasoning language models on NVIDIA NeMo and Megatron-core."""

import os

__version__ = "0.1.0"

# Waiting OpenMP threads spin by default, which makes decoding with a small model 20 times slower on a shared CPU.
# torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
