"""Commands that train: a run, and short comparisons of layouts or number formats."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hunyuan_pretrain.cli.options import ConfigPath, Overrides
from hunyuan_pretrain.cli.printing import print_table
from hunyuan_pretrain.config.recipe import RECIPES


class ParityPrecision(StrEnum):
    """Number formats of a comparison."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class LayerEngine(StrEnum):
    """Whose layers to use: this project's, or Transformer Engine's."""

    own = "own"
    te = "te"


Fp8Recipe = StrEnum("Fp8Recipe", list(RECIPES))  # type: ignore[misc]


class Fp8Format(StrEnum):
    """Formats of FP8."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    accept_changes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[,KEY]...",
            help="Resume although these settings, or the data they name, have changed since the run began.",
        ),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(min=1, help="Branch off from the checkpoint after this many steps (checkpoint.resume_from)."),
    ] = None,
) -> None:
    """Train an experiment, or resume it from its newest checkpoint; under torchrun, each process is one rank.

    Exit code 75: stopped by SIGTERM, SIGUSR1 or Ctrl-C and saved; the same command resumes. A second Ctrl-C exits
    immediately with 130.
    """
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import prepare

    branch = [f"checkpoint.resume_from={from_step}"] if from_step is not None else []
    experiment = load_experiment(config, [*(overrides or []), *branch], int(os.environ.get("WORLD_SIZE", "1")))
    prepare(experiment)

    from hunyuan_pretrain.train.loop import train as run

    accepted = [key.strip() for keys in accept_changes or [] for key in keys.split(",") if key.strip()]
    if not experiment.evaluation.tasks:
        raise typer.Exit(run(experiment, accepted))
    from hunyuan_pretrain.evaluation.in_training import TasksOfRun

    raise typer.Exit(run(experiment, accepted, TasksOfRun()))


def parity(
    config: ConfigPath,
    overrides: Overrides = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Such as tp=2,pp=2; also vpp, cp, ep, etp, dp, micro, zero1=0|1, offload, recompute=..., method=...; "
            "sizes default to 1."
        ),
    ] = "dp=2",
    against: Annotated[str, typer.Option(help="Layout to compare with.")] = "dp=1",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 2,
    precision: Annotated[
        ParityPrecision,
        typer.Option(
            help="fp32, bf16: without FP8; fp8: with the experiment's recipe. Except in fp32, differences are compared "
            "with rounding noise."
        ),
    ] = ParityPrecision.fp32,
    engine: Annotated[
        LayerEngine, typer.Option(help="Layers of the layout: this project's, or Transformer Engine's.")
    ] = LayerEngine.own,
    against_engine: Annotated[
        LayerEngine | None, typer.Option(help="Layers of the other layout; default: the same.")
    ] = None,
) -> None:
    """Train a few steps under two layouts and compare every tensor; if they differ, print the first difference and exit
    with 1.

    The ranks are processes on this machine; under torchrun, the ranks of the job. Small models only: rank 0 holds all
    tensors.
    """
    from hunyuan_pretrain.config.layouts import layout_experiment
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import prepare

    experiment = load_experiment(config, overrides or [])
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    sides = ((layout, engine), (against, against_engine or engine))
    for text, layers in sides:  # report errors before torch is imported, which takes seconds
        layout_experiment(experiment, text, ranks, Path(experiment.run_dir), precision.value, layers.value)
    prepare(experiment)

    from hunyuan_pretrain.diagnostics.parity_run import conclusion, report, run_parity

    differences = run_parity(
        experiment, layout, against, steps, precision.value, *(layers.value for _, layers in sides)
    )
    if not differences:
        return  # a rank other than the first
    print_table(
        f"{layout} against {against}",
        [("", "compared", "bitwise", "largest relative difference", ""), *report(differences)],
    )
    print("\n".join(conclusion(differences)))
    if not all(difference.is_within for difference in differences):
        raise typer.Exit(1)


def shadow(
    config: ConfigPath,
    overrides: Overrides = None,
    recipe: Annotated[Fp8Recipe, typer.Option(help="FP8 recipe to try, emulated.")] = Fp8Recipe["blockwise"],
    fp8_format: Annotated[
        Fp8Format | None, typer.Option("--format", help="Default: Transformer Engine's default for the recipe.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps from the newest checkpoint of the run, or from its beginning.")
    ] = 20,
    output: Annotated[Path | None, typer.Option(help="Write the full report to this file, as JSON.")] = None,
) -> None:
    """Train some steps without and with an FP8 recipe, from the same state and data, and compare losses, gradients and
    values.

    The ranks are processes on this machine; under torchrun, the ranks of the job. Does not change the run. Needs no FP8
    hardware.
    """
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import prepare

    experiment = load_experiment(config, overrides or [])
    prepare(experiment)

    from hunyuan_pretrain.diagnostics.shadow import conclusion, run_shadow, table

    report = run_shadow(experiment, recipe.value, fp8_format.value if fp8_format else None, steps, output)
    if report is None:
        return  # a rank other than the first
    for title, rows in table(report):
        print_table(title, rows)
    print(conclusion(report))
