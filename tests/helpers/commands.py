"""Run `hunyuan-data` in this process."""

from __future__ import annotations

import sys

from data_tools import cli


def run_data(*arguments: object) -> int:
    """Run the command line and return its exit code."""
    before = sys.argv
    sys.argv = ["hunyuan-data", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
