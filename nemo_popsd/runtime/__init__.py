"""Processes and devices: Megatron without CUDA, process groups, seeds."""
