"""Starts runs: ranks on one or several nodes, Slurm jobs, and the demo."""
