"""Megatron-core models: the layers' choice, building from Hugging Face, adapters, forwards and the optimizer."""
