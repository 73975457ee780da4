"""The command `hunyuan-data`: its menu, and how it ends. No logic here; each command calls one function."""

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
    help="Prepare training data: train a tokenizer, tokenize text, pack it into sequences, look at the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
add_version(app)

add_commands(app, tokenizing.train_tokenizer, name="train-tokenizer")
add_commands(app, tokenizing.tokenize, packing.pack, packing.inspect, packing.mix, packing.where, packing.verify)


class _StoppedError(BaseException):
    """SIGTERM or Ctrl-C, in the main thread, so that what is unfinished is taken back on the way out."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the way out must come to its end
    raise _StoppedError(number)


def main() -> None:
    """Run the command line. An error the user can put right is one message on stderr and exit code 2; a SIGTERM is 75,
    Ctrl-C 130."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        app()
    except _StoppedError as stopped:
        print(
            "hunyuan-data: stopped; nothing half-written stays, and `tokenize` goes on by the same command",
            file=sys.stderr,
        )
        sys.exit(EXIT_STOPPED if stopped.args == (signal.SIGTERM,) else EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        _fail(missing)
    except ValueError as error:
        # imported only when something failed, because it takes a tenth of a second here and in every worker
        from hunyuan_pretrain.config.errors import ConfigError

        if not isinstance(error, DataFormatError | ConfigError):
            raise
        _fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                "no space left on the disk of the output; nothing half-written stays, and what `tokenize` had "
                "finished is gone on from"
            )
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> None:
    print(f"hunyuan-data: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)
