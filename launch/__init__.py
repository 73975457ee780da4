"""Starting runs: ranks on one node or many, Slurm, and the demo."""
