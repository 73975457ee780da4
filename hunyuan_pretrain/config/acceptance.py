"""Which changes stop a run that would go on, what --accept-changes lets pass, and how that is told."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from hunyuan_pretrain.config.changes import LONGEST, TABLE, Difference, Kind
from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value


def check_accepted(keys: Collection[str]) -> None:
    """Refuse keys of --accept-changes that name nothing which could change; raises ConfigError with the nearest one."""
    known = [pattern for pattern, kind, _ in TABLE if kind == Kind.refused]
    problems = []
    for key in keys:
        general = ".".join("N" if name.isdecimal() else name for name in key.split("."))
        if not any(pattern == general or pattern.startswith(f"{general}.") for pattern in known):
            near = difflib.get_close_matches(general, known, 1, 0.4)
            rule = "no change that has to be accepted"
            problems.append(
                Problem(
                    "--accept-changes",
                    key,
                    rule,
                    f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}",
                )
            )
    if problems:
        raise ConfigError("train", problems)


def refusal(found: Sequence[Difference], accepted: Collection[str]) -> list[Difference]:
    """The differences that stop a run: those that are never possible, and those that need a hand and have none."""
    return [
        one
        for one in found
        if one.kind == Kind.never or (one.kind == Kind.refused and not is_accepted(one.key, accepted))
    ]


def is_accepted(key: str, accepted: Collection[str]) -> bool:
    """Whether one of the keys of --accept-changes is that of a difference, or of a section around it."""
    return any(key == one or key.startswith(f"{one}.") for one in accepted)


def refusal_text(where: str, stopping: Sequence[Difference]) -> str:
    """One message: what differs, why it stops the run, and what can be done."""
    never = [one for one in stopping if one.kind == Kind.never]
    by_hand = [one for one in stopping if one.kind == Kind.refused]
    lines = [f"{where}: the run cannot go on with this configuration"]
    if never:
        lines += ["a checkpoint of another model:", *(f"  {_told(one)}" for one in never)]
        lines += ["put the old values back, or start another run_dir"]
    if by_hand:
        keys = ",".join(dict.fromkeys(one.key for one in by_hand))
        lines += ["not what the run began with:", *(f"  {_told(one)}" for one in by_hand)]
        lines += [f"put the old values back, or go on all the same with --accept-changes {keys}"]
    return "\n".join(lines)


def _told(one: Difference) -> str:
    return (
        f"{one.key}: {show_value(one.old, LONGEST)} in the checkpoint, {show_value(one.new, LONGEST)} in the config: "
        f"{one.reason}"
    )
