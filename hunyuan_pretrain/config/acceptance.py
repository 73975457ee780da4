"""Which changes stop a run from resuming, what --accept-changes allows, and the message."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from hunyuan_pretrain.config.changes import LONGEST, TABLE, Difference, Kind
from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value


def check_accepted(keys: Collection[str]) -> None:
    """Raise ConfigError if --accept-changes has a key that never needs acceptance; the error names the nearest one."""
    known = [pattern for pattern, kind, _ in TABLE if kind == Kind.refused]
    problems = []
    for key in keys:
        general = ".".join("N" if name.isdecimal() else name for name in key.split("."))
        if not any(pattern == general or pattern.startswith(f"{general}.") for pattern in known):
            near = difflib.get_close_matches(general, known, 1, 0.4)
            rule = "not a change that needs to be accepted"
            problems.append(
                Problem(
                    "--accept-changes",
                    key,
                    rule,
                    f"did you mean {near[0]}?" if near else f"use {', '.join(known)}",
                )
            )
    if problems:
        raise ConfigError("train", problems)


def refusal(found: Sequence[Difference], accepted: Collection[str]) -> list[Difference]:
    """The differences that stop a run: those that are never allowed, and those that need acceptance and lack it."""
    return [
        one
        for one in found
        if one.kind == Kind.never or (one.kind == Kind.refused and not is_accepted(one.key, accepted))
    ]


def is_accepted(key: str, accepted: Collection[str]) -> bool:
    """Whether --accept-changes contains a difference's key, or that of a section around it."""
    return any(key == one or key.startswith(f"{one}.") for one in accepted)


def refusal_text(where: str, stopping: Sequence[Difference]) -> str:
    """One message: what differs, why it stops the run, and what to do."""
    never = [one for one in stopping if one.kind == Kind.never]
    by_hand = [one for one in stopping if one.kind == Kind.refused]
    lines = [f"{where}: the run cannot continue with this configuration"]
    if never:
        lines += ["a checkpoint of another model:", *(f"  {_told(one)}" for one in never)]
        lines += ["restore the old values, or start a new run_dir"]
    if by_hand:
        keys = ",".join(dict.fromkeys(one.key for one in by_hand))
        lines += ["changed since the run began:", *(f"  {_told(one)}" for one in by_hand)]
        lines += [f"restore the old values, or continue anyway with --accept-changes {keys}"]
    return "\n".join(lines)


def _told(one: Difference) -> str:
    return (
        f"{one.key}: {show_value(one.old, LONGEST)} in the checkpoint, {show_value(one.new, LONGEST)} in the config: "
        f"{one.reason}"
    )
