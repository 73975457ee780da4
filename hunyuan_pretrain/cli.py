"""The command `hunyuan-pretrain`. No logic: each command calls one function and prints what it returns.

Imports are inside the commands, so that those which need no torch start at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hunyuan_pretrain.config.extras import missing_package
from hunyuan_pretrain.runtime.stop import listen

if TYPE_CHECKING:
    from hunyuan_pretrain.config.schema import Problem
    from hunyuan_pretrain.runtime.device import Machine

USER_ERRORS = {"ConfigError", "DataFormatError", "CheckpointError", "TrainingError"}
"""Errors that a user can put right: the message says how, so a traceback would only hide it."""

JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each rank in its environment."""
IN_RANKS = ("train", "parity", "shadow")
"""Commands that a launcher may start as the ranks of a job."""

SECONDS_FOR_RANK_0 = 20
"""How long another rank waits with its error for rank 0 to print the same."""

app = typer.Typer(
    name="hunyuan-pretrain",
    help="Pretraining of Hunyuan-Large style mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at experiment files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Experiment YAML, such as configs/dev/demo_cpu.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optimizer.lr=3e-4 stages.0.tokens=1e9."),
]


class ExportDtype(StrEnum):
    """Formats of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class ExportFormat(StrEnum):
    """Layouts of an export."""

    hunyuan = "hunyuan"
    hunyuan_v1_moe = "hunyuan_v1_moe"


class ParityPrecision(StrEnum):
    """Number formats of a comparison."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class LayerEngine(StrEnum):
    """Whose layers."""

    own = "own"
    te = "te"


class Fp8Recipe(StrEnum):
    """FP8 recipes."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class Fp8Format(StrEnum):
    """Formats of FP8."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


# --- commands without torch -------------------------------------------------------------------------------------------


@app.command()
def explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Dotted path of a setting or section; none: every setting there is.")
    ] = "",
) -> None:
    """Say what a setting means: unit, type, default, typical value."""
    from hunyuan_pretrain.config.describe import explain as text_of

    print(text_of(key))


@config_app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    value: Annotated[
        str, typer.Option(metavar="KEY", help="Print the value of this setting alone, as a script needs it.")
    ] = "",
) -> None:
    """Print the resolved experiment as YAML: bases merged, overrides applied, every default filled in."""
    from hunyuan_pretrain.config.describe import value_of
    from hunyuan_pretrain.config.load import dump_resolved, load_experiment

    experiment = load_experiment(config, overrides or [])
    print(value_of(experiment, value) if value else dump_resolved(experiment), end="\n" if value else "")


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
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the job; default: parallel.world_size.")
    ] = None,
) -> None:
    """Say what a run will do and cost, without running it."""
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.config.rules import find_warnings
    from hunyuan_pretrain.plan.summary import summarise

    experiment = load_experiment(config, overrides or [], world_size)
    print_table(
        experiment.name, [(row.group, row.name, row.value, row.note) for row in summarise(experiment, world_size)]
    )
    print_warnings(find_warnings(experiment))


# --- commands with torch ----------------------------------------------------------------------------------------------


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Experiment YAML to check against this machine.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has and what will be used; exit code 1 where it cannot run, or the experiment cannot begin
    or go on."""
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.device import obstacles, probe, what_is_used
    from hunyuan_pretrain.runtime.environment import variable_rows

    experiment = load_experiment(config, overrides or []) if config else None
    machine = probe(thorough=True)
    print_table("found", machine_rows(machine))
    print_table("will be used", what_is_used(machine, experiment))
    print_table("environment", variable_rows(experiment))
    found = [str(problem) for problem in obstacles(machine, experiment)]
    if (
        experiment is not None and machine.megatron_core is not None and machine.apex != "wrong"
    ):  # megatron-core can be imported
        from hunyuan_pretrain.train.preflight import refusals

        found += refusals(experiment)
    for problem in found:
        print(f"cannot run: {problem}", file=sys.stderr)
    if found:
        raise typer.Exit(1)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    accept_changes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[,KEY]...",
            help="Go on although these settings, or what they name, are not what the run began with.",
        ),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(min=1, help="Branch off from the checkpoint after this many steps (checkpoint.resume_from)."),
    ] = None,
) -> None:
    """Train an experiment, going on from its newest checkpoint; under torchrun, one call is one rank.

    Exit code 75: told to stop by SIGTERM or Ctrl-C, saved, and ready to be started again. A second Ctrl-C ends it at
    once, with 130.
    """
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import set_variables

    branch = [f"checkpoint.resume_from={from_step}"] if from_step is not None else []
    experiment = load_experiment(config, [*(overrides or []), *branch], int(os.environ.get("WORLD_SIZE", "1")))
    set_variables(experiment)

    from hunyuan_pretrain.train.loop import train as run

    raise typer.Exit(
        run(experiment, [key.strip() for keys in accept_changes or [] for key in keys.split(",") if key.strip()])
    )


@app.command()
def parity(
    config: ConfigPath,
    overrides: Overrides = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Such as tp=2,pp=2; also vpp, cp, ep, etp, dp, micro, zero1=0|1, recompute=..., method=...; what is "
            "left out is 1."
        ),
    ] = "dp=2",
    against: Annotated[str, typer.Option(help="Layout to compare with.")] = "dp=1",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 2,
    precision: Annotated[
        ParityPrecision,
        typer.Option(
            help="fp32 and bf16: without FP8; fp8: with the experiment's recipe. Below fp32, differences are compared "
            "with rounding noise."
        ),
    ] = ParityPrecision.fp32,
    engine: Annotated[
        LayerEngine, typer.Option(help="Layers of the layout: this project's, or Transformer Engine's.")
    ] = LayerEngine.own,
    against_engine: Annotated[
        LayerEngine | None, typer.Option(help="Layers of the other one; default: the same.")
    ] = None,
) -> None:
    """Train a few steps under two layouts and compare every tensor; exit code 1 and the first difference if they are
    not the same.

    The ranks are processes of this machine; under torchrun, those of the job. Small models only: rank 0 holds all of
    the tensors.
    """
    from hunyuan_pretrain.config.layouts import layout_experiment
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import set_variables

    experiment = load_experiment(config, overrides or [])
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    sides = ((layout, engine), (against, against_engine or engine))
    for text, layers in sides:  # told before torch is imported, which takes seconds
        layout_experiment(experiment, text, ranks, Path(experiment.run_dir), precision.value, layers.value)
    set_variables(experiment)

    from hunyuan_pretrain.train.parity_run import conclusion, report, run_parity

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


@app.command()
def shadow(
    config: ConfigPath,
    overrides: Overrides = None,
    recipe: Annotated[Fp8Recipe, typer.Option(help="FP8 recipe to try, emulated.")] = Fp8Recipe.blockwise,
    fp8_format: Annotated[
        Fp8Format | None, typer.Option("--format", help="Default: Transformer Engine's for the recipe.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps from the newest checkpoint of the run, or from its beginning.")
    ] = 20,
    output: Annotated[Path | None, typer.Option(help="Write the whole report here, as JSON.")] = None,
) -> None:
    """Train some steps without and with an FP8 recipe, from the same state and data: what it does to losses, gradients
    and values.

    The ranks are processes of this machine; under torchrun, those of the job. Changes nothing of the run. Needs no FP8
    hardware.
    """
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.runtime.environment import set_variables

    experiment = load_experiment(config, overrides or [])
    set_variables(experiment)

    from hunyuan_pretrain.train.shadow import conclusion, run_shadow, table

    report = run_shadow(experiment, recipe.value, fp8_format.value if fp8_format else None, steps, output)
    if report is None:
        return  # a rank other than the first
    for title, rows in table(report):
        print_table(title, rows)
    print(conclusion(report))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a training run.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint after this many steps; default: the newest.")] = None,
    dtype: Annotated[ExportDtype | None, typer.Option(help="Format of the weights; default: that of training.")] = None,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hunyuan: with our own model code. hunyuan_v1_moe: what transformers and vLLM load natively."
        ),
    ] = ExportFormat.hunyuan,
) -> None:
    """Write a checkpoint in Hugging Face format, load it back, and compare its logits with the training model's."""
    from hunyuan_pretrain.runtime.environment import compute_on_cpu

    compute_on_cpu()

    from hunyuan_pretrain.train.export_run import export_run

    certificate = export_run(run, output, step=step, dtype=dtype.value if dtype else None, format=format.value)
    print(f"{output}: {certificate['format']}, {certificate['dtype']}, step {certificate['source']['step']}")
    print(
        f"logits against the training model: largest difference {certificate['max_abs_difference']:.3g}, see "
        "certificate.json"
    )


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by export.")],
    prompt: Annotated[str, typer.Option(help="Beginning of the text, or with --chat the user's turn.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 20,
    repetition_penalty: Annotated[float, typer.Option(min=0.1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 1234,
    chat: Annotated[bool, typer.Option(help="Use the chat template.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run model code that lies in DIR; our own exports do not need it.")
    ] = False,
) -> None:
    """Continue a text with an exported model, streaming to standard output."""
    from hunyuan_pretrain.checkpoint.generate import generate as stream

    stream(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
        trust_remote_code=trust_remote_code,
    )


# --- printing ---------------------------------------------------------------------------------------------------------


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """A probed machine as name and value."""
    from hunyuan_pretrain.runtime.device import transformer_engine_versions

    gpus = ", ".join(
        f"{gpu.name} (compute {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_gib:.0f} GiB)"
        for gpu in machine.gpus
    )
    apex = {"nvidia": "NVIDIA's", "wrong": "a package of this name that is not NVIDIA's", "absent": "absent"}
    engine = machine.transformer_engine or "absent"
    fits = " to ".join(f"{major}.{minor}" for major, minor in transformer_engine_versions(machine.megatron_core))
    return [
        ("python", machine.python),
        ("torch", f"{machine.torch}, {'CPU build' if machine.cuda is None else 'CUDA ' + machine.cuda}"),
        ("GPUs", gpus or "none"),
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory_gib:.1f} GiB"),
        ("megatron-core", f"{machine.megatron_core or 'absent'} (works with Transformer Engine {fits})"),
        (
            "Transformer Engine",
            f"{engine}, but {machine.transformer_engine_error}" if machine.transformer_engine_error else engine,
        ),
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


def report_error(error: Exception | str) -> None:
    """Print a user's error, once in a job: nearly every such error is found by every rank.

    A launcher stops the whole job as soon as one rank has failed, so the other ranks leave rank 0 the time to print.
    One that is still there after that met an error of its own (a file that only its node lacks, say), and prints it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, as soon as rank 0 has ended
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"rank {rank}: {error}", file=sys.stderr)
    else:
        print(error, file=sys.stderr)


def report_failure() -> None:
    """Print the traceback of the error being handled, and of which rank it is."""
    text = traceback.format_exc()
    if "RANK" in os.environ:
        text = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')} failed:\n{text}"
    print(text, end="", file=sys.stderr, flush=True)  # in one piece, for several ranks write to the same place


def leave(status: int) -> NoReturn:
    """End this process; at once where it is one of several ranks.

    The others may be waiting for it in a collective, and Python's own way out would leave its process groups in order:
    wait for them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def mistake_in_environment(command: str | None) -> str | None:
    """What is wrong with the names that say which rank of a job this is; for commands that run alone they are
    forgotten.

    A launcher sets all of JOB. Some of them are left over from elsewhere, and to guess would be to wait for ranks that
    never come, or to take each rank for a run of its own.
    """
    if command not in IN_RANKS:
        for name in (*JOB[:2], "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return None
    there = [name for name in (*JOB, "LOCAL_RANK") if name in os.environ]
    missing = [name for name in JOB if name not in os.environ]
    if not missing or not {*JOB[:2], "LOCAL_RANK"} & set(there):
        return None
    found = ", ".join(f"{name}={os.environ[name]}" for name in there)
    return (
        f"the environment has {found}, but not {', '.join(missing)}: a launcher sets all of them for each rank; "
        f"start ranks with launch/train.sh, or unset {' '.join(there)}"
    )


def main() -> None:
    """Entry point; a user's error is one message on stderr and exit code 2, a failure a traceback and 1, an interrupt
    is 130."""
    if sys.argv[1:2] == ["train"]:
        listen()  # a launcher may pass a stop on while torch is being imported
    if (mistake := mistake_in_environment(next(iter(sys.argv[1:]), None))) is not None:
        print(mistake, file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        missing = missing_package(error)
        if missing is None and USER_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            report_failure()
            leave(1)
        report_error(missing or error)
        leave(2)
