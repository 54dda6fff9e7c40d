"""The small model and the problem sets that are part of the package, by their names in configurations."""
