"""Megatron-core models: choice of layers, building, adapters, forward passes, decoding and the optimizer."""
