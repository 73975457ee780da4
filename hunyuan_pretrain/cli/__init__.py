"""The command `hunyuan-pretrain`."""

from hunyuan_pretrain.config.extras import end_without

try:
    from hunyuan_pretrain.cli.program import app, main
except ModuleNotFoundError as error:
    end_without(error)

__all__ = ["app", "main"]
