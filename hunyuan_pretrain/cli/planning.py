"""Commands that inspect an experiment and this machine before a run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hunyuan_pretrain.cli.options import ConfigPath, Overrides
from hunyuan_pretrain.cli.printing import print_table, print_warnings
from hunyuan_pretrain.config.exit_status import EXIT_MISTAKE

if TYPE_CHECKING:
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.plan.hardware import Hardware
    from hunyuan_pretrain.plan.passes import Assumptions
    from hunyuan_pretrain.runtime.device import Machine


def init(
    size: Annotated[str, typer.Option(help="Size of the model: tiny, 300m, 7b or large.")],
    gpus: Annotated[int, typer.Option(help="GPUs of the job.")],
    hardware: Annotated[str, typer.Option(metavar="NAME|FILE", help="The GPUs: h100, h20, h200, b200, a YAML file.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of packed data: one dataset, or a folder for each role (web, code, books, ...)."
        ),
    ],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, such as 300B.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Experiment YAML to write; it must not exist.")],
) -> None:
    """Write an experiment for these GPUs: model, stages, data, and the fastest layout that fits by the plan."""
    from hunyuan_pretrain.plan.new_experiment import Request, new_experiment, write_new

    write_new(output, new_experiment(Request(size, gpus, hardware, data, tokens, output)))
    print(f"{output}: written. Look at it with `hunyuan-pretrain plan {output}`")


def explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Dotted path of a setting or section; default: all settings.")
    ] = "",
) -> None:
    """Explain a setting: meaning, type, unit, default, typical value."""
    from hunyuan_pretrain.config.describe import explain as text_of

    print(text_of(key))


def show(
    config: ConfigPath,
    overrides: Overrides = None,
    value: Annotated[
        str, typer.Option(metavar="KEY", help="Print only the value of this setting, for use in scripts.")
    ] = "",
) -> None:
    """Print the resolved experiment as YAML: bases merged, overrides applied, every default filled in."""
    from hunyuan_pretrain.config.describe import value_of
    from hunyuan_pretrain.config.load import dump_resolved, load_experiment

    experiment = load_experiment(config, overrides or [])
    print(value_of(experiment, value) if value else dump_resolved(experiment), end="\n" if value else "")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Experiment YAML.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Experiment YAML.")],
) -> None:
    """Print the settings in which two resolved experiments differ."""
    from hunyuan_pretrain.config.describe import diff as lines_of
    from hunyuan_pretrain.config.load import load_experiment

    lines = lines_of(load_experiment(a), load_experiment(b))
    print("\n".join(lines) if lines else "no difference")


def schema() -> None:
    """Print the JSON schema of experiment files, for editors that complete and check YAML."""
    from hunyuan_pretrain.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Experiment YAML, such as configs/dev/demo_cpu.yaml.")
    ] = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size", "--gpus", min=1, help="Ranks of the job, one for each GPU; default: parallel.world_size."
        ),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="GPUs of the job, for times and what fits: H200-141GB, another name, or a YAML file.",
        ),
    ] = "",
    document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a document; default: one document fills a sequence.")
    ] = None,
    imbalance: Annotated[
        float, typer.Option(min=1.0, help="Rows of the busiest rank's experts over the mean, without a capacity.")
    ] = 1.0,
    search: Annotated[
        bool, typer.Option("--search", help="Find the fastest layouts that fit; the experiment's own does not matter.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every row, and the numbers behind it.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a page with charts: one HTML file that loads nothing."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Without CONFIG: measure this machine, also as the ranks of torchrun, and write a profile for "
            "--hardware. What cannot be measured is that of --hardware, or of this GPU's profile.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Also build ranks of the job without its machines, run a step on tensors without memory, and compare "
            "what they communicate and hold. Exit code 2 if the job cannot run.",
        ),
    ] = False,
) -> None:
    """Show what a run will do and cost, without running it: memory and communication of each rank; with --hardware also
    what fits, the time of a step, MFU, days and energy; with --search the layouts that are fastest."""
    if calibrate:
        others = (config, overrides, world_size, document_tokens, imbalance != 1, as_json, html, dry_run, search)
        if any(others):
            raise typer.BadParameter("--calibrate measures this machine; it goes with --hardware only")
        _calibrate(calibrate, hardware)
        return
    if config is None:
        raise typer.BadParameter("missing; name an experiment, or a file with --calibrate", param_hint="CONFIG")

    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.plan import page
    from hunyuan_pretrain.plan.hardware import load
    from hunyuan_pretrain.plan.passes import Assumptions

    if html:
        page.PAGE.check(html)
    if as_json and dry_run:
        raise typer.BadParameter("the dry run prints no JSON; leave one of --json and --dry-run out")
    if search and (dry_run or html):
        other = "--dry-run" if dry_run else "--html"
        raise typer.BadParameter(f"{other} is of one layout; leave one of --search and {other} out")
    profile, assumed = load(hardware) if hardware else None, Assumptions(document_tokens, imbalance)
    if search:
        _search(load_experiment(config, overrides or []), world_size, profile, assumed, as_json)
        return
    experiment = load_experiment(config, overrides or [], world_size)
    _plan(experiment, world_size, profile, assumed, as_json, html)
    if dry_run:
        _dry_run(experiment, world_size)


def _plan(
    experiment: Experiment,
    world_size: int | None,
    profile: Hardware | None,
    assumed: Assumptions,
    as_json: bool,
    html: Path | None,
) -> None:
    from hunyuan_pretrain.config.rules import find_warnings
    from hunyuan_pretrain.plan import costs
    from hunyuan_pretrain.plan.summary import ranks_of, summarise

    rows = summarise(experiment, world_size)
    found = costs.costs(experiment, ranks_of(experiment, world_size), profile, assumed)
    rows += costs.rows(found)
    if as_json:
        data = {"name": experiment.name, "rows": [asdict(row) for row in rows], **costs.as_data(found)}
        print(json.dumps(data, indent=1))
    else:
        print_table(experiment.name, [(row.group, row.name, row.value, row.note) for row in rows])
    print_warnings(warnings := find_warnings(experiment))
    for line in costs.problems(found):
        print(f"warning: {line}", file=sys.stderr)
    if html:
        from hunyuan_pretrain.plan import page

        page.PAGE.write(html, page.page(found, rows, [*map(str, warnings), *costs.problems(found)]))
        print(f"{html}: written", file=sys.stderr)


def _calibrate(output: Path, hardware: str) -> None:
    from hunyuan_pretrain.diagnostics.calibration import calibrate

    if rows := calibrate(output, hardware):
        print_table("measured", rows)
        print(f"{output}: written. Use it with `hunyuan-pretrain plan CONFIG --hardware {output}`")


def _dry_run(experiment: Experiment, world_size: int | None) -> None:
    from hunyuan_pretrain.runtime.environment import prepare, set_variables

    set_variables(experiment)
    prepare(None)  # nothing is computed, and a GPU stays free

    from hunyuan_pretrain.diagnostics import dry_run, dry_run_checks

    ran = dry_run.dry_run(experiment, world_size)
    problems = dry_run_checks.find_problems(ran)
    result = "failed" if problems else "OK for what was checked"
    print_table("dry run", [*dry_run_checks.rows(ran), ("result", result, "")])
    for problem in problems:
        print(f"cannot run: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(EXIT_MISTAKE)


def _search(
    experiment: Experiment, gpus: int | None, profile: Hardware | None, assumed: Assumptions, as_json: bool
) -> None:
    from hunyuan_pretrain.config.errors import ConfigError, Problem
    from hunyuan_pretrain.plan import costs, ranking
    from hunyuan_pretrain.plan.hardware import names

    missing = []
    if profile is None:
        missing.append(Problem("--search", Problem.NO_VALUE, "needs --hardware", f"{', '.join(names())}, or a file"))
    gpus = gpus or experiment.parallel.world_size
    if gpus is None:
        missing.append(Problem("--search", Problem.NO_VALUE, "needs the number of GPUs", "add --gpus 512, say"))
    if profile is None or gpus is None:
        raise ConfigError(experiment.name, missing)
    costs.check_assumptions(experiment, profile, assumed)
    found = ranking.searches(experiment, gpus, profile, assumed)
    rows = [row for one in found for row in ranking.rows(one, profile)]
    if as_json:
        data = {"name": experiment.name, "gpus": gpus, "hardware": profile.name, "rows": [asdict(row) for row in rows]}
        print(json.dumps(data | {"stages": [ranking.as_data(experiment, one, gpus) for one in found]}, indent=1))
        return
    title = f"{experiment.name} on {gpus} {profile.name}"
    print_table(title, [(row.group, row.name, row.value, row.note) for row in rows])
    for one in found:
        print("\n".join(ranking.settings(experiment, one, gpus)), end="\n\n")


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Experiment YAML to check against this machine.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Under torchrun, on all ranks: compare them, measure each and the links between them in a minute, and "
            "name those that differ or are slow.",
        ),
    ] = False,
    message_bytes: Annotated[
        list[int] | None,
        typer.Option(min=4, help="With --cluster: size of the messages, in bytes; may be repeated."),
    ] = None,
) -> None:
    """Show what this machine has and what will be used; exit code 1 if it cannot train, or if the experiment cannot
    start or resume. With --cluster, do so for the ranks of a job."""
    from hunyuan_pretrain.config.load import load_experiment

    if cluster:
        _doctor_of_cluster(load_experiment(config, overrides or []) if config else None, message_bytes or [])
        return
    if message_bytes:
        raise typer.BadParameter("--message-bytes goes with --cluster only")
    from hunyuan_pretrain.runtime.device import probe
    from hunyuan_pretrain.runtime.environment import variable_rows
    from hunyuan_pretrain.runtime.policy import obstacles, what_is_used

    experiment = load_experiment(config, overrides or []) if config else None
    machine = probe(thorough=True)
    print_table("found", machine_rows(machine))
    print_table("will be used", what_is_used(machine, experiment))
    print_table("environment", variable_rows(experiment))
    found = [str(problem) for problem in obstacles(machine, experiment)]
    if (
        experiment is not None and machine.megatron_core is not None and machine.apex != "wrong"
    ):  # megatron-core can be imported
        from hunyuan_pretrain.runtime import cpu_megatron

        cpu_megatron.install()

        from hunyuan_pretrain.train.preflight import attention_trials, refusals

        found += [*refusals(experiment), *_refused_tasks(experiment)]
        if not found and machine.gpus and experiment.runtime.device != "cpu":
            rows, failed = attention_trials(experiment, machine)
            print_table("attention", rows)
            found += failed
    for problem in found:
        print(f"cannot run: {problem}", file=sys.stderr)
    if found:
        raise typer.Exit(1)


def _refused_tasks(experiment: Experiment) -> list[str]:
    """What is wrong with evaluation.tasks on this machine, as training says it."""
    if not experiment.evaluation.tasks:
        return []
    from hunyuan_pretrain.evaluation.in_training import TasksOfRun

    obstacle = TasksOfRun().obstacle(experiment)
    return [] if obstacle is None else [f"evaluation.tasks: {obstacle}"]


def _doctor_of_cluster(experiment: Experiment | None, sizes: list[int]) -> None:
    """Rank 0 prints, and alone fails: a launcher reports each rank that does."""
    from hunyuan_pretrain.runtime import cpu_megatron
    from hunyuan_pretrain.runtime.environment import advice_rows, set_variables, variable_rows

    if experiment is not None:
        set_variables(experiment)
    cpu_megatron.install()

    from hunyuan_pretrain.diagnostics import cluster

    place, device = cluster.join()
    differing, (rows, slow) = cluster.compare(experiment), cluster.measure(place, device, sizes)
    ranks = cluster.rows_of_ranks(place, device)
    cluster.end()
    if place.rank > 0:
        return
    print_table("ranks", ranks)
    print_table("environment of rank 0", [*variable_rows(experiment), *advice_rows()])
    print_table("measured", rows)
    for line in [*(f"differs: {problem}" for problem in differing), *(f"slow: {line}" for line in slow)]:
        print(line, file=sys.stderr)
    if differing or slow:
        raise typer.Exit(1)
    print("no rank differs, and none is slow")


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """(name, value) rows of a probed machine."""
    from hunyuan_pretrain.runtime.policy import transformer_engine_versions

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
        ("flash-attn-3", machine.flash_attn_3 or "absent"),
        ("triton", machine.triton or "absent"),
        ("wandb", machine.wandb or "absent"),
        ("tensorboard", machine.tensorboard or "absent"),
    ]
