"""The `ladder` commands: train experiments of several sizes, and fit scaling laws to finished runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hunyuan_pretrain.cli.printing import print_table

if TYPE_CHECKING:
    from hunyuan_pretrain.diagnostics.ladder import Laws

Targets = Annotated[
    list[Path] | None, typer.Option(metavar="CONFIG", help="Experiment whose loss to predict; may be repeated.")
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(metavar="FLOPS", min=1.0, help="Budget for which to give the best size; may be repeated."),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where to write ladder.json and ladder.png; default: beside the first run."),
]
Loss = Annotated[
    str,
    typer.Option(help="Name in metrics.jsonl; auto: validation_loss if every run has it, else the training loss."),
]


def run(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG_OR_FOLDER... [KEY=VALUE]...", help="Experiments; overrides are for all of them."
        ),
    ],
    target: Targets = None,
    compute: Budgets = None,
    output: Output = None,
    loss: Loss = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the commands that would be run, as a shell script.")
    ] = False,
) -> None:
    """Train experiments one after another on this node, then fit scaling laws.

    Finished runs are skipped and interrupted ones resumed. Exit code 75: stopped and saved; the same command continues.
    """
    from hunyuan_pretrain.diagnostics.ladder import commands, fit_all, read_ladder, train_all
    from hunyuan_pretrain.diagnostics.scaling_laws import ScalingError, best_settings, require_spread

    overrides = [text for text in configs if "=" in text and not Path(text).exists()]
    rungs = read_ladder([Path(text) for text in configs if text not in overrides], overrides)
    try:
        require_spread(best_settings([rung.expected for rung in rungs]))
    except ScalingError as error:  # known before hours of training; other laws may still be fitted
        print(f"warning: {error}", file=sys.stderr)
    if dry_run:
        print("\n".join(commands(rungs, overrides)))
        return
    targets = _targets(target)
    status = train_all(rungs, overrides)
    if status:
        raise typer.Exit(status)
    _show(fit_all([rung.run_dir for rung in rungs], loss), targets, compute, output or rungs[0].run_dir.parent)


def fit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories of finished runs.")],
    target: Targets = None,
    compute: Budgets = None,
    output: Output = None,
    loss: Loss = "auto",
) -> None:
    """Fit scaling laws to finished runs."""
    from hunyuan_pretrain.diagnostics.ladder import fit_all

    targets = _targets(target)
    _show(fit_all(runs, loss), targets, compute, output or runs[0].parent)


def _targets(paths: Sequence[Path] | None) -> list[Path]:
    """The targets, checked before anything is trained."""
    from hunyuan_pretrain.config.load import load_experiment

    for path in paths or []:
        load_experiment(path)
    return list(paths or [])


def _show(laws: Laws, targets: Sequence[Path], budgets: Sequence[float] | None, output: Path) -> None:
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.diagnostics.ladder import report, table, write
    from hunyuan_pretrain.diagnostics.ladder_runs import expected

    sizes = [expected(experiment, experiment.name) for experiment in map(load_experiment, targets)]
    found = report(laws, sizes, budgets or [])
    print_table(f"{len(laws.runs)} runs, {laws.loss}; intervals of {found['coverage']:.0%}", table(found))
    for reason in [*found["not_fitted"], *found["warnings"]]:
        print(f"warning: {reason}", file=sys.stderr)
    try:
        print("\n".join(write(found, laws, output)))
    except OSError as error:
        print(f"{output}: cannot be written: {error.strerror}", file=sys.stderr)
        raise typer.Exit(2) from None
