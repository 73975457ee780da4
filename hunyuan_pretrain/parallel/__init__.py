"""Importing this package makes megatron-core importable on this machine."""

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()
