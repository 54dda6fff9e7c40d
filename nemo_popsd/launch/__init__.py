"""Tasks for launchers that have an interface in Python; torchrun, srun and `slurm/` start the command itself."""
