"""Importing this package makes megatron-core importable on this machine."""

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()


class TrainingError(RuntimeError):
    """Training cannot start or go on: the message says at which step, or in which probe, and why."""
