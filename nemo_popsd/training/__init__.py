"""One on-policy step: trajectories, frozen branches, objective, guards, metrics."""
