"""The command `hunyuan-pretrain`. No logic: each command calls one function and prints what it returns.

Imports are inside the commands, so that those which need no torch start at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hunyuan_pretrain.config.schema import Problem
    from hunyuan_pretrain.runtime.device import Machine

USER_ERRORS = {"ConfigError", "DataFormatError", "CheckpointError"}
"""Errors that a user can put right: the message says how, so a traceback would only hide it."""

app = typer.Typer(
    name="hunyuan-pretrain",
    help="Pretraining of Hunyuan-Large style mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at experiment files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment YAML, such as configs/dev/demo_cpu.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optimizer.lr=3e-4 stages.0.tokens=1e9.")
]


# --- commands without torch ---------------------------------------------------------------------------------------------------


@app.command()
def explain(key: Annotated[str, typer.Argument(metavar="KEY", help="Dotted path of a setting or section; none: everything.")] = "") -> None:
    """Say what a setting means: unit, type, default, typical value."""
    from hunyuan_pretrain.config.describe import explain as text_of

    print(text_of(key))


@config_app.command()
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved experiment as YAML: bases merged, overrides applied, every default filled in."""
    from hunyuan_pretrain.config.load import dump_resolved, load_experiment

    print(dump_resolved(load_experiment(config, overrides or [])), end="")


@config_app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Experiment YAML.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Experiment YAML.")],
) -> None:
    """Print the settings in which two resolved experiments differ."""
    from hunyuan_pretrain.config.describe import diff as lines_of
    from hunyuan_pretrain.config.load import load_experiment

    lines = lines_of(load_experiment(a), load_experiment(b))
    print("\n".join(lines) if lines else "no difference")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks of the job; default: parallel.world_size.")] = None,
) -> None:
    """Say what a run will do and cost, without running it."""
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.config.rules import find_warnings
    from hunyuan_pretrain.plan.summary import summarise

    experiment = load_experiment(config, overrides or [], world_size)
    print_table(experiment.name, [(row.group, row.name, row.value, row.note) for row in summarise(experiment, world_size)])
    print_warnings(find_warnings(experiment))


# --- commands with torch ------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Experiment YAML to check against this machine.")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has and what will be used; exit code 1 where it cannot run (the experiment)."""
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.device import obstacles, probe, what_is_used

    experiment = load_experiment(config, overrides or []) if config else None
    machine = probe(thorough=True)
    print_table("found", machine_rows(machine))
    print_table("will be used", what_is_used(machine, experiment))
    found = obstacles(machine, experiment)
    for problem in found:
        print(f"cannot run: {problem}", file=sys.stderr)
    if found:
        raise typer.Exit(1)


# --- printing -----------------------------------------------------------------------------------------------------------------


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """A probed machine as name and value."""
    gpus = ", ".join(f"{gpu.name} (compute {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_gib:.0f} GiB)" for gpu in machine.gpus)
    apex = {"nvidia": "NVIDIA's", "wrong": "a package of this name that is not NVIDIA's", "absent": "absent"}
    engine = machine.transformer_engine or "absent"
    return [
        ("python", machine.python),
        ("torch", f"{machine.torch}, {'CPU build' if machine.cuda is None else 'CUDA ' + machine.cuda}"),
        ("GPUs", gpus or "none"),
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory_gib:.1f} GiB"),
        ("megatron-core", machine.megatron_core or "absent"),
        ("Transformer Engine", f"{engine}, but {machine.transformer_engine_error}" if machine.transformer_engine_error else engine),
        ("Apex", apex[machine.apex]),
        ("flash-attn", machine.flash_attn or "absent"),
        ("wandb", machine.wandb or "absent"),
        ("tensorboard", machine.tensorboard or "absent"),
    ]


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of text under a title; the first column is printed once for equal neighbours."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    previous = None
    for row in rows:
        table.add_row("" if row[0] == previous else row[0], *row[1:])
        previous = row[0]
    # A pipe or a log has no width: nothing may be cut or wrapped there.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print()


def print_warnings(warnings: list[Problem]) -> None:
    """Settings that take effect only partly, to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def main() -> None:
    """Entry point; a user's error is one message on stderr and exit code 2, an interrupt is 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        if USER_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)
