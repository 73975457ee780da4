"""What each step of a run does: which stage, how large a batch, which places of the stage's data, and what learning
rate.

A run is a list of segments: configurations that were in force one after the other, each from some step on. The schedule
that follows is cut into pieces of one stage of one segment. Position within a stage is counted in tokens and sequences,
never in steps, so that another batch goes on where the data and the learning rate were. Pure functions of the
configurations and their first steps; no torch.

Learning rate. Within a stage it is a function of the tokens trained there, from the fraction of optimizer.lr at which
the stage before ended (0 at the start of a run) to lr_end, by lr_shape; the last step has exactly lr_end. When a run
goes on with a changed configuration:

- another batch only: the same function goes on, the steps are other ones;
- another length, lr_end or lr_shape of the present stage: the rest of the stage goes from the fraction of the last step
  that was trained to lr_end over the tokens that are left, by lr_shape; so a run whose end is moved has no jump, and
  one that had ended goes on at lr_end;
- stages that have ended are over: changes of theirs have no effect;
- another optimizer.lr multiplies all of it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import StageConfig


@dataclass(frozen=True)
class LrCurve:
    """Fractions of optimizer.lr between two numbers of tokens of a stage."""

    shape: str
    start: float
    end: float
    first_token: int
    last_token: int

    def at(self, tokens: int) -> float:
        """Fraction of the step after which `tokens` of the stage are trained."""
        progress = (tokens - self.first_token) / (self.last_token - self.first_token)
        match self.shape:
            case "constant":
                return self.end
            case "linear":
                return self.start + (self.end - self.start) * progress
            case _:
                return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Piece:
    """Steps that follow one another in one stage of one segment."""

    segment: int
    """Number of the segment, from 0."""
    index: int
    """Of the stage in the segment's configuration."""
    stage: StageConfig
    lane: int
    """Which stage of the run it is, from 0: pieces of one stage have the same."""
    first_step: int
    num_steps: int
    """As trained, or as planned where nothing has come of it yet."""
    first_position: int
    """Of the stage's data, in sequences, skipped ones counted."""
    end_position: int
    """Where the stage's data ends, as planned when the piece began; skipped ones counted."""
    tokens_before: int
    """Of the stage, trained before the piece."""
    curve: LrCurve

    @property
    def num_planned_sequences(self) -> int:
        """Sequences of the rest of the stage, as planned when the piece began, without skipped ones."""
        return self.end_position - self.first_position - skipped_after(self.stage, self.first_position)

    @property
    def end_step(self) -> int:
        """The step after its last."""
        return self.first_step + self.num_steps

    def tokens_after(self, num_steps: int) -> int:
        """Tokens of the stage that are trained after so many steps of the piece."""
        return self.tokens_before + num_steps * self.stage.global_batch_tokens

    def position_of(self, number: Any) -> Any:
        """Place in the stage's data of the piece's `number`-th sequence that is not skipped, both from 0; an int or an
        array of numpy."""
        position = number + self.first_position
        for first, end in skipped_positions(self.stage):
            begin = max(first, self.first_position)
            if end > begin:
                position = position + (position >= begin) * (end - begin)
        return position

    def next_position(self, num_steps: int) -> int:
        """Place that follows the last one read after so many steps of the piece."""
        number = num_steps * self.stage.global_batch_sequences
        return int(self.position_of(number - 1)) + 1 if number else self.first_position


def skipped_positions(stage: StageConfig) -> list[tuple[int, int]]:
    """[first, end) of the places of a stage's data that are not trained on."""
    batch = stage.global_batch_sequences
    return [((first - 1) * batch, last * batch) for first, last in stage.skip_data_steps]


def skipped_after(stage: StageConfig, position: int) -> int:
    """Sequences of a stage's data, from a place on, that are not trained on."""
    return sum(max(end - max(first, position), 0) for first, end in skipped_positions(stage))


class Schedule:
    """All steps of a run; steps are counted from 0 over all its stages."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = [piece.end_step for piece in self.pieces]
        self.first_steps = {piece.lane: piece.first_step for piece in reversed(self.pieces)}
        """First step of each stage of the run."""

    @classmethod
    def of(cls, stages: Sequence[StageConfig]) -> Schedule:
        """The schedule of a run that begins."""
        return cls(_plan(stages, 0, segment=0, lane=0, first_step=0, start=0.0))

    @classmethod
    def of_segments(cls, segments: Sequence[tuple[int, Sequence[StageConfig]]]) -> Schedule:
        """The schedule after (first step, stages) of each segment, the first from step 0."""
        schedule = cls.of(segments[0][1])
        for number, (first_step, stages) in enumerate(segments[1:], start=1):
            schedule = schedule.resumed(first_step, stages, segment=number)
        return schedule

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return self._ends[-1] if self._ends else 0

    def piece_of_step(self, step: int) -> Piece:
        """The piece of a step. Raises IndexError past the end."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        return self.pieces[bisect_right(self._ends, step)]

    def stage(self, step: int) -> StageConfig:
        """The stage of a step, as it was configured when the step was trained."""
        return self.piece_of_step(step).stage

    def stage_of_step(self, step: int) -> tuple[int, int]:
        """(stage of the run, step within it) of a step, both from 0, however often the run was changed in the stage.
        Raises IndexError past the end."""
        lane = self.piece_of_step(step).lane
        return lane, step - self.first_steps[lane]

    def lr_fraction(self, step: int) -> float:
        """Learning rate of a step as a fraction of optimizer.lr."""
        piece = self.piece_of_step(step)
        return piece.curve.at(piece.tokens_after(step - piece.first_step + 1))

    def tokens_after(self, num_steps: int) -> int:
        """Tokens of the whole run that are trained after so many steps."""
        lengths = ((piece, min(num_steps, piece.end_step) - piece.first_step) for piece in self.pieces)
        return sum(length * piece.stage.global_batch_tokens for piece, length in lengths if length > 0)

    def position(self, num_steps: int) -> dict[str, int | str]:
        """Where a run is after so many steps: stage, sequences and tokens trained in it, next place of its data, tokens
        of the run."""
        piece = self.piece_of_step(max(num_steps - 1, 0))
        local = num_steps - piece.first_step
        return {
            "step": num_steps,
            "stage": piece.stage.name,
            "tokens_of_stage": piece.tokens_after(local),
            "next_sequence_of_stage": piece.next_position(local),
            "tokens": self.tokens_after(num_steps),
        }

    def resumed(self, step: int, stages: Sequence[StageConfig], segment: int) -> Schedule:
        """The schedule where, after `step` steps, a configuration with these stages takes over.

        The present stage is found by its name, or where it has a new name by its number. Raises ConfigError if it is
        not there, or ends before what is trained.
        """
        if step == 0:
            return Schedule(_plan(stages, 0, segment=segment, lane=0, first_step=0, start=0.0))
        done = [
            replace(piece, num_steps=min(piece.end_step, step) - piece.first_step)
            for piece in self.pieces
            if piece.first_step < step
        ]
        last = done[-1]
        old, index = last.stage, present_stage(last, stages)
        new = stages[index]
        tokens = last.tokens_after(last.num_steps)
        _refuse_shorter(index, old, new, tokens, step)
        fraction = self.lr_fraction(step - 1)
        left = max(-(-(new.tokens - tokens) // new.global_batch_tokens), 0)
        pieces = [*done]
        if left:
            end = tokens + left * new.global_batch_tokens
            same = (old.tokens, old.lr_end, old.lr_shape) == (new.tokens, new.lr_end, new.lr_shape)
            curve = (
                replace(last.curve, last_token=end)
                if same
                else LrCurve(new.lr_shape, fraction, new.lr_end, tokens, end)
            )
            position = last.next_position(last.num_steps)
            end_position = position + left * new.global_batch_sequences + skipped_after(new, position)
            pieces.append(Piece(segment, index, new, last.lane, step, left, position, end_position, tokens, curve))
        # exactly lr_end after a stage that has ended, whatever rounding made of its last step
        start = new.lr_end if left else last.curve.end if tokens == last.curve.last_token else fraction
        return Schedule(
            [
                *pieces,
                *_plan(
                    stages, index + 1, segment=segment, lane=last.lane + 1, first_step=pieces[-1].end_step, start=start
                ),
            ]
        )


def present_stage(piece: Piece, stages: Sequence[StageConfig]) -> int:
    """Number of a piece's stage in another configuration; raises ConfigError where it is not there."""
    names = [stage.name for stage in stages]
    if piece.stage.name in names:
        return names.index(piece.stage.name)
    if piece.index < len(stages):
        return piece.index
    rule = (
        f"the checkpoint was taken in stage {piece.stage.name}, number {piece.index}, and the configuration has no "
        "such stage"
    )
    raise ConfigError("stages", [Problem("stages", names, rule, "keep that stage; stages may be added after it")])


def _plan(
    stages: Sequence[StageConfig], first: int, *, segment: int, lane: int, first_step: int, start: float
) -> list[Piece]:
    """Stages that have not begun, from number `first` on; `start`: fraction of the learning rate at which they
    begin."""
    pieces = []
    for index, stage in enumerate(stages[first:], start=first):
        steps = stage.num_steps
        curve = LrCurve(stage.lr_shape, start, stage.lr_end, 0, steps * stage.global_batch_tokens)
        end_position = steps * stage.global_batch_sequences + skipped_after(stage, 0)
        pieces.append(Piece(segment, index, stage, lane + index - first, first_step, steps, 0, end_position, 0, curve))
        first_step, start = first_step + steps, stage.lr_end
    return pieces


def _refuse_shorter(index: int, old: StageConfig, new: StageConfig, tokens: int, step: int) -> None:
    """Raise ConfigError where a stage is made to end before what is trained of it."""
    if new.tokens < old.tokens and -(-new.tokens // old.global_batch_tokens) * old.global_batch_tokens < tokens:
        rule = f"{tokens:,} tokens of stage {new.name} are trained after step {step}, so it cannot end before them"
        hint = f"use at least {tokens}, or branch from an earlier checkpoint with --from-step"
        raise ConfigError("the run cannot go on", [Problem(f"stages.{index}.tokens", new.tokens, rule, hint)])
