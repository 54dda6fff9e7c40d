"""Runs one step of one rank at the real sizes of a run, without peers, weights or a GPU.

The code of the run builds the student, adapters, Megatron's buffers and the optimizer, and runs a step. Collectives use
torch's back end that sends nothing; floating-point tensors have shapes but no storage. The measurements are compared
with `popsd plan`.
"""
