"""The command `hunyuan-data`."""

from data_tools.cli.program import app, main

__all__ = ["app", "main"]
