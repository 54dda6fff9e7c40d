"""The small model and the problem sets that ship with the package, under the names that configurations use."""
