"""Importing this package makes megatron-core importable on this machine."""

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()


class TrainingError(RuntimeError):
    """Training cannot start or continue; the message names the step or probe and the reason."""
