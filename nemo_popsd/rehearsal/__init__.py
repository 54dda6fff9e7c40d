"""One step of a run by one of its ranks, at the run's real sizes, without peers, weights or a GPU.

The run's own code builds the student, adapters, Megatron's buffers and optimizer, and carries out a step. Collectives
go to torch's back end that sends nothing; floating-point tensors have shapes, but no memory. What is measured is
compared with `popsd plan`.
"""
