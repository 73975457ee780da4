"""The command `checkpoints`: what a run directory holds, verified, removed, kept under a name, or continued from."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hunyuan_pretrain.cli.printing import print_table

if TYPE_CHECKING:
    from hunyuan_pretrain.checkpoint.listing import Entry


class Action(StrEnum):
    """What to do with the checkpoints."""

    list = "list"
    verify = "verify"
    remove = "remove"
    keep = "keep"
    release = "release"
    branch = "branch"


def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a training run.")],
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="list, verify, remove, keep, release or branch.")
    ] = Action.list,
    steps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STEP]...",
            help="Steps or names; also the words damaged and partial. list and verify: default all.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="keep: the name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="remove: also the newest good one.")] = False,
    into: Annotated[Path | None, typer.Option(metavar="DIR", help="branch: a new run directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List, verify, remove or name the checkpoints of a run, or say how to continue from one.

    list: what is there, damaged and unfinished ones too. verify: read every byte and compare it with its digest; exit
    code 1 if any is damaged. remove: those given, never one with a name, and none that a running job may need. keep:
    under --name, which protects it from checkpoint.keep_last until release. branch: print the command that trains on
    from it.
    """
    from hunyuan_pretrain.checkpoint import CheckpointError, listing, retention

    _check_options(action, steps, name, force, into)
    listed = listing.entries(run)
    chosen = listing.choose(listed, steps or [], run)
    match action:
        case Action.list:
            _print(run, chosen if steps else listed, as_json)
        case Action.verify:
            _verify(run, chosen, as_json)
        case Action.remove:
            listing.refuse_removal(run, listed, chosen, force)
            for entry in listing.remove(chosen):
                _say(f"removed {entry.folder}", as_json)
            if as_json:
                _print(run, listing.entries(run), as_json)
        case Action.keep:
            entry = listing.the_one(chosen, "keep")
            retention.keep(run, entry.folder, str(name))
            _say(f"{entry.folder} is kept as {name}, until `checkpoints {run} release {name}`", as_json)
            if as_json:
                _print(run, [entry._replace(name=name)], as_json)
        case Action.release:
            for entry in chosen:
                if entry.name is None:
                    raise CheckpointError(f"{entry.folder} has no name")
            for entry in chosen:
                retention.release(entry.folder)
                _say(f"{entry.folder} is no longer kept as {entry.name}", as_json)
            if as_json:
                _print(run, [entry._replace(name=None) for entry in chosen], as_json)
        case Action.branch:
            arguments = listing.branch_arguments(run, listing.the_one(chosen, "branch"), into)
            command = shlex.join(["hunyuan-pretrain", *arguments])
            print(json.dumps({"run": str(run), "command": command}) if as_json else command)


def _check_options(action: Action, steps: list[str] | None, name: str | None, force: bool, into: Path | None) -> None:
    """Raise typer.BadParameter for an option of another action, or one that is missing."""
    for option, value, of in (
        ("--name", name, Action.keep),
        ("--force", force, Action.remove),
        ("--into", into, Action.branch),
    ):
        if value and action != of:
            raise typer.BadParameter(f"{option} goes with {of.value}, not with {action.value}")
    if action == Action.keep and not name:
        raise typer.BadParameter("keep needs --name")
    if action in (Action.remove, Action.keep, Action.release, Action.branch) and not steps:
        raise typer.BadParameter(f"{action.value} needs a step")


def _say(line: str, as_json: bool) -> None:
    print(line, file=sys.stderr if as_json else sys.stdout)


def _print(run: Path, entries: Sequence[Entry], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": str(run), "checkpoints": [entry.as_json() for entry in entries]}, indent=1))
        return
    rows = [("step", "age", "size", "layout", "dtype", "tokens", "loss", ""), *map(_row, entries)]
    print_table(f"{run}: {_count(entries)}", rows)


def _count(entries: Sequence[Entry]) -> str:
    states = [entry.state for entry in entries]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
    return ", ".join(counts) or "no checkpoints"


def _row(entry: Entry) -> tuple[str, ...]:
    from hunyuan_pretrain.checkpoint.listing import age_text
    from hunyuan_pretrain.plan.summary import size_text

    words = [] if entry.name is None else [f"kept as {entry.name}"]
    if entry.state != "complete":
        words.append(f"{entry.state}: {entry.fault}")
    ranks = f" on {entry.world_size}" if entry.world_size else ""
    return (
        f"{entry.step:,}",
        age_text(entry.saved_at),
        "" if entry.size_bytes is None else size_text(entry.size_bytes),
        f"{entry.layout or ''}{ranks}",
        entry.dtype or "",
        "" if entry.tokens is None else f"{entry.tokens:,}",
        "" if entry.loss is None else f"{entry.loss:.4f}",
        "; ".join(words),
    )


def _verify(run: Path, chosen: Sequence[Entry], as_json: bool) -> None:
    from hunyuan_pretrain.checkpoint.listing import verify

    found: list[dict[str, Any]] = []
    for number, entry in enumerate(chosen, start=1):
        fault = verify(entry, _Progress(f"{entry.folder.name} ({number} of {len(chosen)})"))
        found.append({"folder": str(entry.folder), "step": entry.step, "fault": fault})
        _say(f"{entry.folder.name}: {fault or 'good'}", as_json)
    if as_json:
        print(json.dumps({"run": str(run), "checkpoints": found}, indent=1))
    elif not chosen:
        print(f"{run}: no complete checkpoint to verify")
    if any(one["fault"] is not None for one in found):
        raise typer.Exit(1)


class _Progress:
    """Prints how much has been read, on stderr, at most every few seconds."""

    EVERY_S = 5.0

    def __init__(self, what: str) -> None:
        self._what, self._last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        from hunyuan_pretrain.plan.summary import size_text

        if time.monotonic() - self._last >= self.EVERY_S:
            self._last = time.monotonic()
            print(f"{self._what}: {size_text(done)} of {size_text(total)}", file=sys.stderr, flush=True)
