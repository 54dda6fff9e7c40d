"""Purified On-Policy Self-Distillation of long-reasoning language models on NVIDIA NeMo and Megatron-core."""

import os

__version__ = "0.1.0"

# Threads of OpenMP spin while they wait; on a shared CPU, decoding with a small model is twenty times slower then.
# torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
