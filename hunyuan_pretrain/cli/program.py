"""The command `hunyuan-pretrain`: its menu and its exit. No logic: each command calls one function and prints the
result.

Modules that need torch are imported inside the commands, so that commands without torch start fast.
"""

from __future__ import annotations

import sys

import typer

from hunyuan_pretrain.cli import (
    evaluating,
    exporting,
    laddering,
    planning,
    quantizing,
    reporting,
    serving,
    submitting,
    training,
)
from hunyuan_pretrain.cli.checkpoints import checkpoints
from hunyuan_pretrain.cli.ranks import end_with_launcher, leave, mistake_in_environment, report_error, report_failure
from hunyuan_pretrain.config.exit_status import EXIT_INTERRUPTED, EXIT_MISTAKE
from hunyuan_pretrain.config.extras import missing_package
from hunyuan_pretrain.config.menu import HELP, add_commands, add_version
from hunyuan_pretrain.runtime.stop import listen

USER_ERRORS = {"ConfigError", "DataFormatError", "CheckpointError", "TrainingError", "ScalingError"}
USER_ERRORS |= {"EvaluationError", "ServingError"}
"""Errors that a user can fix: the message says how, and a traceback would only hide it."""

app = typer.Typer(
    name="hunyuan-pretrain",
    help="Pretraining of Hunyuan-Large style mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
add_version(app)
config_app = typer.Typer(help="Inspect experiment files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

add_commands(
    app,
    planning.init,
    planning.explain,
    planning.plan,
    planning.doctor,
    training.train,
    submitting.submit,
    reporting.report,
    reporting.runs,
    training.parity,
    training.shadow,
    checkpoints,
    exporting.export,
)
add_commands(app, exporting.import_, name="import")
add_commands(app, exporting.merge_lora, quantizing.quantize, exporting.generate, serving.serve, serving.chat)
add_commands(app, evaluating.evaluate, evaluating.long_context, evaluating.bits_per_byte)
add_commands(config_app, planning.show, planning.diff, planning.schema)
ladder_app = typer.Typer(help="Train a ladder of small runs and fit scaling laws.", no_args_is_help=True)
app.add_typer(ladder_app, name="ladder")
add_commands(ladder_app, laddering.run, laddering.fit)


def main() -> None:
    """Entry point. Exit codes: 2 for a user's error, with one message on stderr; 1 for a failure, with a traceback; 130
    for an interrupt."""
    if sys.argv[1:2] == ["train"]:
        listen()  # a launcher may forward a stop signal while torch is being imported
    if (mistake := mistake_in_environment(sys.argv[1:])) is not None:
        print(mistake, file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    end_with_launcher()
    try:
        app()
    except KeyboardInterrupt:
        leave(EXIT_INTERRUPTED)
    except Exception as error:
        missing = missing_package(error)
        if missing is None and USER_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            report_failure(error)
            leave(1)
        report_error(missing or error)
        leave(EXIT_MISTAKE)
