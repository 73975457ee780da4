"""The command `hunyuan-data`."""

from hunyuan_pretrain.config.extras import end_without

try:
    from data_tools.cli.program import app, main
except ModuleNotFoundError as error:
    end_without(error)

__all__ = ["app", "main"]
