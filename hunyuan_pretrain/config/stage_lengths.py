"""The length of a stage that is given in epochs: turned into tokens, from the manifests of the packed data, when an
experiment is loaded. What is resolved, recorded and compared is a number of tokens, so a run that resumes with data
that has grown is one whose `tokens` have changed.

An epoch of a stage is every sequence of all its sources once. Several sources are mixed in proportion to their size, so
each is read that often.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import DataSource, Experiment, StageConfig


class _Size(NamedTuple):
    """Of a packed dataset."""

    sequences: int
    tokens: int
    """Without padding."""


class _NoSizeError(Exception):
    """Why a packed dataset has no size that counts: rule and hint of a Problem."""


def stages_have_one_length(experiment: Experiment) -> Iterator[Problem]:
    """tokens or epochs; with epochs, the sources' sizes are their weights."""
    for number, stage in enumerate(experiment.stages):
        where = f"stages.{number}"
        if stage.tokens is None and stage.epochs is None:
            yield Problem(where, Problem.NO_VALUE, "has no length", "give tokens, or epochs")
        if stage.epochs is None:
            continue
        if stage.tokens is not None:
            rule = f"is the length of the stage, and so is tokens={stage.tokens}"
            yield Problem(f"{where}.epochs", stage.epochs, rule, "set one of them, the other null")
        if len(stage.data) == 1:
            continue
        mixed = "with epochs, every source is read that often"
        for index, source in enumerate(stage.data):
            if source.weight != DataSource.model_fields["weight"].default:
                yield Problem(f"{where}.data.{index}.weight", source.weight, mixed, "leave it out, or give tokens")
        if stage.tier_weights is not None:
            yield Problem(f"{where}.tier_weights", stage.tier_weights, mixed, "leave them out, or give tokens")


def with_tokens(experiment: Experiment) -> tuple[Experiment, list[Problem]]:
    """(the experiment with `tokens`, and weights of several sources, in place of `epochs`; what prevents that).

    Reads the manifests of those stages' data, and no other file.
    """
    problems = list(stages_have_one_length(experiment))
    if problems:
        return experiment, problems
    stages = []
    for number, stage in enumerate(experiment.stages):
        try:
            stages.append(stage if stage.epochs is None else _counted(stage, stage.epochs))
        except _NoSizeError as error:
            problems.append(Problem(f"stages.{number}.epochs", stage.epochs, *error.args))
    return (experiment if problems else experiment.model_copy(update={"stages": tuple(stages)})), problems


def _counted(stage: StageConfig, epochs: float) -> StageConfig:
    """The stage with the length of so many epochs, in whole sequences. Raises _NoSizeError."""
    sizes = [_size_of(source.path, stage.sequence_length) for source in stage.data]
    # the number as it is written: 0.1 is not the fraction of a power of two that is nearest
    sequences = math.ceil(Fraction(repr(epochs)) * sum(size.sequences for size in sizes))
    data = stage.data
    if len(data) > 1:
        weighed = zip(data, sizes, strict=True)
        data = tuple(source.model_copy(update={"weight": float(size.tokens)}) for source, size in weighed)
    length = {"epochs": None, "tokens": sequences * stage.sequence_length}
    return stage.model_copy(update={**length, "data": data})


def _size_of(folder: str, sequence_length: int) -> _Size:
    """What a manifest says; that the rest of the folder fits it is checked when the data is opened. Raises
    _NoSizeError."""
    path = Path(folder, "manifest.json")
    hint = "pack it; without it, as for a plan: epochs: null, and tokens: 1B or what it will be"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"an epoch is all of the packed data, and {path} cannot be read: {error.strerror}"
        raise _NoSizeError(rule, hint) from None
    except ValueError:
        manifest = None
    names = ("sequences", "tokens", "sequence_length")
    found = {name: manifest.get(name) for name in names} if isinstance(manifest, dict) else {}
    counts = [count for count in found.values() if type(count) is int and count > 0]
    if len(counts) < len(names) or manifest.get("format") != "hunyuan-packed":
        raise _NoSizeError(
            f"an epoch is all of the packed data, and {path} is not what `hunyuan-data pack` writes", hint
        )
    sequences, tokens, length = counts
    if length != sequence_length:
        rule = f"{folder} is packed to sequences of {length} tokens, and sequence_length is {sequence_length}"
        raise _NoSizeError(rule, f"use {length}, or pack it again")
    return _Size(sequences, tokens)
