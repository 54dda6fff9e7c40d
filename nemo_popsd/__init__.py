"""Purified On-Policy Self-Distillation of long-reasoning language models on NVIDIA NeMo and Megatron-core."""

__version__ = "0.1.0"
