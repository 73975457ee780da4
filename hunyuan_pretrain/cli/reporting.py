"""Commands that show how runs go: `report` as a page, `runs` as a list."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hunyuan_pretrain.cli.printing import print_table

if TYPE_CHECKING:
    from hunyuan_pretrain.report.runs import RunLine


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are overlaid.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. Default: report.html in the run, of several runs here."),
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Write it again and again until Ctrl-C; a browser reads it again."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="GPUs of the plan's figures, as for `plan`; default: those of the run, if known."
        ),
    ] = "",
) -> None:
    """Write how runs went, or are going, as one HTML file that loads nothing: losses, speed against the plan, experts,
    events, data."""
    from hunyuan_pretrain.plan.hardware import load
    from hunyuan_pretrain.report.page import PAGE, page
    from hunyuan_pretrain.report.records import RunFiles

    profile = load(hardware) if hardware else None
    files = [RunFiles(run) for run in dict.fromkeys(runs)]
    path = out or (files[0].run_dir / "report.html" if len(files) == 1 else Path("report.html"))
    PAGE.check(path)
    while True:
        for one in files:
            one.read()
        PAGE.write(path, page(files, profile, watch))
        if watch is None:
            break
        print(f"{path}: written at {time.strftime('%H:%M:%S')}", file=sys.stderr)
        time.sleep(watch)
    print(f"{path}: written")


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look, with the folders in it.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs below a folder: how far, how fast, the newest checkpoint, and whether it runs, stopped, finished or
    failed."""
    from hunyuan_pretrain.report.runs import runs_below

    found = runs_below(folder)
    if as_json:
        print(json.dumps([one.as_json() for one in found], indent=1))
        return
    if not found:
        print(f"{folder}: no runs")
        return
    heads = ("run", "name", "stage", "step", "loss", "tokens/s", "checkpoint", "state", "job")
    print_table(f"{len(found)} runs" if len(found) != 1 else "1 run", [heads, *(_row(one, folder) for one in found)])


def _row(run: RunLine, folder: Path) -> tuple[str, ...]:
    from hunyuan_pretrain.checkpoint.listing import age_text

    place = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
    of = "" if run.num_steps is None else f" of {run.num_steps:,}"
    saved = "" if run.checkpoint is None else f"{run.checkpoint:,}, {age_text(run.saved_at)} old"
    return (
        str(place if place != Path(".") else run.folder),
        run.name,
        run.stage or "",
        f"{run.step:,}{of}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        saved,
        f"{run.state.word}: {run.state.reason}" if run.state.reason else run.state.word,
        run.job or "",
    )
