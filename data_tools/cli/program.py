"""The command `hunyuan-data`: its subcommands and its exit statuses. No logic here; each command calls one function."""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from data_tools.cli import packing, tokenizing
from hunyuan_pretrain.config.exit_status import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_STOPPED
from hunyuan_pretrain.config.extras import missing_package
from hunyuan_pretrain.config.menu import HELP, add_commands, add_version
from hunyuan_pretrain.data.errors import DataFormatError

app = typer.Typer(
    help="Prepare training data: train a tokenizer, tokenize text, pack it into sequences, inspect the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
add_version(app)

add_commands(app, tokenizing.train_tokenizer, name="train-tokenizer")
add_commands(app, tokenizing.tokenize, packing.pack, packing.inspect, packing.mix, packing.where, packing.verify)


class _StoppedError(BaseException):
    """SIGTERM or Ctrl-C, raised in the main thread so that cleanup handlers remove unfinished output."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the cleanup must run to its end
    raise _StoppedError(number)


def main() -> None:
    """Run the command line. An error that the user can fix is one message on stderr and exit status 2; SIGTERM exits
    with 75, Ctrl-C with 130."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        app()
    except _StoppedError as stopped:
        print(
            "hunyuan-data: stopped; no partial output is left, and the same command resumes `tokenize` and `pack`",
            file=sys.stderr,
        )
        sys.exit(EXIT_STOPPED if stopped.args == (signal.SIGTERM,) else EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        _fail(missing)
    except ValueError as error:
        # imported only after a failure: the import takes 0.1 s here and in every worker
        from hunyuan_pretrain.config.errors import ConfigError

        if not isinstance(error, DataFormatError | ConfigError):
            raise
        _fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                "no space left on the output disk; no partial output is left, and `tokenize` and `pack` resume after "
                "their last finished shards or groups"
            )
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> None:
    print(f"hunyuan-data: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)
