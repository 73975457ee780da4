"""The command `hunyuan-pretrain`."""

from hunyuan_pretrain.cli.program import app, main

__all__ = ["app", "main"]
