"""The training loop. Without a CUDA device, call runtime.cpu_megatron.install() before importing it."""

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.require(__name__)


class TrainingError(RuntimeError):
    """Training cannot start or continue; the message names the step or probe and the reason."""
