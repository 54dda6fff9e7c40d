"""Megatron without CUDA or Transformer Engine, random state, signals during start-up."""
