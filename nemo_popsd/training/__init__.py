"""One training step: trajectories, frozen branches, objective, guards, metrics."""
