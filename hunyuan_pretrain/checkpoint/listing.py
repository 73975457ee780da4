"""What a run directory holds in checkpoints, and what a person may do with them: `hunyuan-pretrain checkpoints`. Needs
no torch, and no ranks.

Listing reads each complete.json and the sizes of its files. Verifying reads every byte.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from hunyuan_pretrain.checkpoint import CheckpointError, folders, retention
from hunyuan_pretrain.checkpoint.faults import Fault, opened
from hunyuan_pretrain.checkpoint.stored import check_object, tensor_record
from hunyuan_pretrain.runtime.lock import holder_of

WORDS = ("damaged", "partial")
"""Groups of folders that a command takes in place of a step."""


class Entry(NamedTuple):
    """One folder of <run_dir>/checkpoints."""

    folder: Path
    step: int
    state: str
    """complete, damaged (set aside by a run, or with a fault), unreadable or newer (see faults.Fault), or partial (an
    unfinished save)."""
    fault: str | None = None
    """What is wrong with it."""
    size_bytes: int | None = None
    saved_at: float | None = None
    """Seconds since 1970: when complete.json was written."""
    layout: str | None = None
    world_size: int | None = None
    dtype: str | None = None
    tokens: int | None = None
    """Read up to this step."""
    loss: float | None = None
    """Of this step, if it was logged."""
    name: str | None = None
    """Under which it is kept."""

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "folder": str(self.folder)}


def entries(run_dir: Path) -> list[Entry]:
    """Every checkpoint of a run, by step: complete, damaged and unfinished ones. Raises CheckpointError if `run_dir` is
    not a run directory."""
    place = run_dir / "checkpoints"
    if not place.is_dir():
        what = "no such folder" if not run_dir.is_dir() else "not a run directory: it has no folder checkpoints/"
        raise CheckpointError(f"{run_dir}: {what}")
    found = [
        (int(match[1]), match[2], folder)
        for folder in place.iterdir()
        if (match := re.fullmatch(r"step_(\d{7,})(.*)", folder.name)) and folder.is_dir()
    ]
    found.sort()
    with ThreadPoolExecutor(folders.THREADS) as pool:
        listed = list(pool.map(lambda one: _entry(*one), found))
    losses = _losses(run_dir / "metrics.jsonl", {entry.step for entry in listed})
    return [entry._replace(loss=losses.get(entry.step)) for entry in listed]


def _entry(step: int, suffix: str, folder: Path) -> Entry:
    if suffix.endswith(folders.PARTIAL):
        return Entry(folder, step, "partial", "an unfinished save or removal")
    name = retention.name_of(folder)
    fault = None
    if suffix:
        is_aside = suffix.startswith(folders.DAMAGED)
        fault = Fault("damaged", "set aside by a run that could not use it" if is_aside else suffix)
    try:
        marker = folders.read_marker(folder)
        fault = fault or folders.fault_of(folder, marker)
        state, text = fault or ("complete", None)
        return Entry(
            folder,
            step,
            state,
            text,
            sum(file["bytes"] for file in marker["files"].values()),
            (folder / folders.MARKER).stat().st_mtime,
            marker.get("layout"),
            marker["world_size"],
            str(marker.get("dtype", "")).removeprefix("torch.") or None,
            marker.get("position", {}).get("tokens"),
            name=name,
        )
    except (CheckpointError, OSError, TypeError, KeyError, AttributeError) as error:
        fault = fault or folders.fault_of(folder) or Fault("damaged", str(error))
        return Entry(folder, step, fault.state, fault.text, name=name)


def _losses(metrics: Path, steps: Collection[int]) -> dict[int, float]:
    """Training loss of these steps, as far as metrics.jsonl has them."""
    found: dict[int, float] = {}
    try:
        with metrics.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                step = re.match(r'\{"step": (\d+)[,}]', line)
                if step and int(step[1]) in steps and '"loss": ' in line:
                    found[int(step[1])] = float(json.loads(line)["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return found  # a listing without losses is better than none
    return found


def choose(listed: Sequence[Entry], wanted: Sequence[str], run_dir: Path) -> list[Entry]:
    """The entries that `wanted` names: steps, names, or one of WORDS; all complete ones if it is empty. Raises
    CheckpointError naming each that does not exist."""
    if not wanted:
        return [entry for entry in listed if entry.state == "complete"]
    chosen: dict[Path, Entry] = {}
    unknown = []
    for one in wanted:
        matching = [entry for entry in listed if _is_meant(entry, one)]
        if not matching and one not in WORDS:
            unknown.append(one)
        chosen |= {entry.folder: entry for entry in matching}
    if unknown:
        there = ", ".join(str(entry.step) for entry in listed if folders.step_of(entry.folder) is not None) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint {', '.join(unknown)}; there are: {there}")
    return list(chosen.values())


def _is_meant(entry: Entry, wanted: str) -> bool:
    if wanted in WORDS:
        return entry.state == wanted
    is_named = folders.step_of(entry.folder) is not None
    return is_named and wanted in (str(entry.step), entry.folder.name, entry.name)


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(entry: Entry, progress: Callable[[int, int], None]) -> str | None:
    """Compare every file of a checkpoint with its digest, and look into every pickle. Returns what is wrong, or None.

    `progress` is called with the bytes read so far and those of all files.
    """
    if fault := folders.fault_of(entry.folder):  # a missing file, or one of another length: found at once
        return fault.text
    try:
        marker = folders.read_marker(entry.folder)
        files: Mapping[str, Any] = marker["files"]
        total, done = sum(file["bytes"] for file in files.values()), 0
        with ThreadPoolExecutor(folders.THREADS) as pool:
            jobs = {pool.submit(folders.verify_file, entry.folder, marker, name): name for name in files}
            try:
                for job in as_completed(jobs):
                    job.result()
                    done += files[jobs[job]]["bytes"]
                    progress(done, total)
            except CheckpointError:
                pool.shutdown(cancel_futures=True)
                raise
        _look_into(entry.folder, marker)
    except (CheckpointError, OSError) as error:
        return str(error).removeprefix(f"{entry.folder}: ")
    return None


def _look_into(folder: Path, marker: Mapping[str, Any]) -> None:
    """Raise UnsafePickleError if anything in a checkpoint would be refused when it is loaded, CheckpointError if
    anything cannot be read."""
    index = folders.index_of(folder, marker)
    records = [chunk.section for tensor in index.tensors.values() for chunk in tensor.chunks]
    checks = [(section, tensor_record) for section in records] + [
        (section, check_object) for section in index.objects.values()
    ]
    checks.sort(key=lambda check: check[0])
    for file, of_file in groupby(checks, key=lambda check: check[0].file):
        with opened(folder / file) as descriptor:
            for section, check in of_file:
                check(descriptor, section)


# --- remove, keep, release, branch ------------------------------------------------------------------------------------


def refuse_removal(run_dir: Path, listed: Sequence[Entry], doomed: Sequence[Entry], force: bool) -> None:
    """Raise CheckpointError with every reason against removing `doomed`.

    A checkpoint under a name has to be released first. The newest good one, or one that may be good, goes only with
    `force`, and never while a process trains in the run; an unfinished save of a process that does is never touched.
    """
    good = [entry for entry in listed if entry.state not in WORDS]
    newest = good[-1].folder if good else None
    is_last = newest is not None and any(entry.folder == newest for entry in doomed)
    has_partial = any(entry.state == "partial" for entry in doomed)
    holder = holder_of(run_dir) if is_last or has_partial else None
    reasons = [
        f"{entry.folder.name} is kept as {entry.name}: release it first" for entry in doomed if entry.name is not None
    ]
    if is_last and newest is not None and holder is not None:
        reasons.append(f"{newest.name} is the newest good one, and {holder} trains in this run: stop it first")
    elif is_last and newest is not None and not force:
        left = [entry for entry in good if entry not in doomed]
        then = f"the run would resume from step {left[-1].step}" if left else "the run would start from the beginning"
        reasons.append(f"{newest.name} is the newest good one: without it {then}; --force removes it")
    if has_partial and holder is not None:
        reasons.append(f"{holder} trains in this run, and may be writing an unfinished save: stop it first")
    if reasons:
        raise CheckpointError(f"{run_dir}: nothing is removed\n" + "\n".join(f"  {reason}" for reason in reasons))


def remove(doomed: Sequence[Entry]) -> Iterator[Entry]:
    """Remove folders one after another, oldest first; yields each that is gone. Raises CheckpointError."""
    for entry in sorted(doomed, key=lambda entry: entry.step):
        try:
            if not folders.remove(entry.folder):
                raise CheckpointError(f"{entry.folder}: it has just been given a name, so it is kept")
        except FileNotFoundError:
            continue  # the retention of a running job was faster
        except OSError as error:
            raise CheckpointError(f"{entry.folder}: cannot be removed: {error.strerror}") from None
        yield entry


def the_one(chosen: Sequence[Entry], what: str) -> Entry:
    """The only entry of `chosen`, which must be complete. Raises CheckpointError."""
    if len(chosen) != 1:
        raise CheckpointError(f"{what} takes one step, found {len(chosen)}")
    (entry,) = chosen
    if entry.state != "complete":
        raise CheckpointError(f"{entry.folder}: {entry.state}: {entry.fault}; {what} takes a complete one")
    return entry


def branch_arguments(run_dir: Path, entry: Entry, into: Path | None) -> list[str]:
    """Arguments of `hunyuan-pretrain` that continue from a checkpoint: in the run itself, or `into` a new run
    directory. Raises CheckpointError if that one has checkpoints, or if the run has no configuration."""
    resolved = run_dir / "resolved.yaml"
    if not resolved.is_file():
        raise CheckpointError(f"{run_dir}: it has no resolved.yaml; give `train` the run's own YAML and --from-step")
    if into is None:
        return ["train", str(resolved), "--from-step", str(entry.step)]
    if (into / "checkpoints").is_dir() and folders.named_checkpoints(into):
        raise CheckpointError(f"{into}: has checkpoints of its own; choose a new run directory")
    return ["train", str(resolved), f"run_dir={into}", f"checkpoint.resume_from={entry.folder.absolute()}"]


def age_text(saved_at: float | None, now: float | None = None) -> str:
    """How long ago, in the largest unit of which it is at least two."""
    if saved_at is None:
        return ""
    seconds = max((time.time() if now is None else now) - saved_at, 0.0)
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
