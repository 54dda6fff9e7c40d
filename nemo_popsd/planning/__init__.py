"""Estimates the cost of a run before it is queued: memory, FLOPs, bytes moved and time by formula. No torch.

config.py      nodes, hardware and lengths that the estimate assumes
sizes.py       sizes of a model, from its config.json or from a file in models/
layout.py      a layout on a number of GPUs, and reasons why it is impossible
workload.py    sequences, micro-batches and branches of one step
parameters.py  parameters of one rank
memory.py      bytes of one GPU, by use and by phase
compute.py     floating-point operations of one GPU
traffic.py     bytes that one GPU sends, by parallel dimension
duration.py    converts operations and bytes to seconds
plan.py        the full estimate of one layout; the nearest layouts that fit
report.py      the text and JSON that `popsd plan` prints
settings.py    separates the settings of the plan from those of the run
command.py     the output of `popsd plan`, from its settings

The formulas are written out in docs/planning.md.
"""
