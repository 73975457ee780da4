"""Process groups and collectives. Without a CUDA device, call runtime.cpu_megatron.install() before importing it."""

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.require(__name__)
