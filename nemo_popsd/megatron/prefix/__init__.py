"""Frozen forward passes in which each token prefix of a set of sequences is computed once."""
