"""Tasks for launchers with a Python interface; torchrun, srun and `slurm/` start the command directly."""
