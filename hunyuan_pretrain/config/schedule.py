"""What each step of a run does: its stage, batch size, positions in the stage's data, and learning rate.

A run is a list of segments: configurations that took effect one after another, each from a certain step. The schedule
is a list of pieces; each piece belongs to one stage of one segment. Position within a stage is counted in tokens and
sequences, never in steps, so a run that resumes with another batch size continues at the same data and learning rate.
Everything here is a pure function of the configurations and their first steps; no torch.

Learning rate. Within a stage it is a function of the tokens trained in that stage. It goes from the fraction of
optimizer.lr at which the previous stage ended (0 at the start of a run) to lr_end, by lr_shape; the last step has
exactly lr_end. When a run resumes with a changed configuration:

- batch size only: the function stays the same; only the steps at which it is evaluated change;
- length, lr_end or lr_shape of the current stage: the rest of the stage goes from the fraction of the last trained step
  to lr_end over the remaining tokens, by lr_shape. Moving the end of a run therefore causes no jump, and a run that had
  ended continues at lr_end;
- stages that have ended: changes to them have no effect;
- optimizer.lr: the new value scales the whole curve.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hunyuan_pretrain.config.decisions import Window
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import StageConfig


@dataclass(frozen=True)
class LrCurve:
    """Learning rate, as a fraction of optimizer.lr, between two token counts of a stage."""

    shape: str
    start: float
    end: float
    first_token: int
    last_token: int

    def at(self, tokens: int) -> float:
        """Fraction for the step after which `tokens` tokens of the stage are trained."""
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
    """Consecutive steps in one stage of one segment."""

    segment: int
    """Number of the segment, from 0."""
    index: int
    """Of the stage in the segment's configuration."""
    stage: StageConfig
    lane: int
    """Which stage of the run it is, from 0; all pieces of one stage have the same value."""
    first_step: int
    num_steps: int
    """As trained; as planned if the piece has not been trained yet."""
    first_position: int
    """Where the piece starts in the stage's data, in sequences, counting skipped ones."""
    end_position: int
    """Where the stage's data ends, as planned when the piece began, counting skipped sequences."""
    tokens_before: int
    """Tokens of the stage trained before the piece."""
    curve: LrCurve
    skipped: tuple[tuple[int, int], ...] = ()
    """[first, end) ranges of positions in the stage's data that are not trained on; in order, apart."""

    @property
    def num_planned_sequences(self) -> int:
        """Remaining sequences of the stage, as planned when the piece began, without skipped ones."""
        return self.end_position - self.first_position - skipped_after(self.skipped, self.first_position)

    @property
    def end_step(self) -> int:
        """The step after the piece's last step."""
        return self.first_step + self.num_steps

    def tokens_after(self, num_steps: int) -> int:
        """Tokens of the stage that are trained after `num_steps` steps of the piece."""
        return self.tokens_before + num_steps * self.stage.global_batch_tokens

    def position_of(self, number: Any) -> Any:
        """Position in the stage's data of the piece's `number`-th sequence that is not skipped. Both count from 0;
        `number` is an int or a NumPy array."""
        position = number + self.first_position
        for first, end in self.skipped:
            begin = max(first, self.first_position)
            if end > begin:
                position = position + (position >= begin) * (end - begin)
        return position

    def next_position(self, num_steps: int) -> int:
        """Position after the last sequence that `num_steps` steps of the piece have read."""
        number = num_steps * self.stage.global_batch_sequences
        return int(self.position_of(number - 1)) + 1 if number else self.first_position


def skipped_positions(stage: StageConfig, left_out: Sequence[Window]) -> tuple[tuple[int, int], ...]:
    """[first, end) ranges of positions in a stage's data that are not trained on, in order and apart: those of
    skip_data_steps, and those that roll-backs left out."""
    batch = stage.global_batch_sequences
    ranges = [((first - 1) * batch, last * batch) for first, last in stage.skip_data_steps]
    ranges += [(first, end) for name, first, end in left_out if name == stage.name]
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def skipped_after(skipped: Sequence[tuple[int, int]], position: int) -> int:
    """Number of sequences in a stage's data, from `position` on, that are not trained on."""
    return sum(max(end - max(first, position), 0) for first, end in skipped)


class Schedule:
    """All steps of a run, counted from 0 over all stages."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = [piece.end_step for piece in self.pieces]
        self.first_steps = {piece.lane: piece.first_step for piece in reversed(self.pieces)}
        """First step of each stage of the run."""

    @classmethod
    def of(cls, stages: Sequence[StageConfig]) -> Schedule:
        """The schedule of a new run."""
        return cls(_plan(stages, 0, (), segment=0, lane=0, first_step=0, start=0.0))

    @classmethod
    def of_segments(
        cls, segments: Sequence[tuple[int, Sequence[StageConfig]]], left_out: Sequence[Sequence[Window]] | None = None
    ) -> Schedule:
        """The schedule of a run with these segments, each (first step, stages); the first starts at step 0. left_out:
        what roll-backs left out, by segment."""
        schedule = cls.of(segments[0][1])
        for number, (first_step, stages) in enumerate(segments[1:], start=1):
            windows = left_out[number] if left_out is not None else ()
            schedule = schedule.resumed(first_step, stages, segment=number, left_out=windows)
        return schedule

    @property
    def num_steps(self) -> int:
        """Total steps of all stages."""
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
        """(stage of the run, step within that stage) of a step, both from 0. Changes to the run within the stage do not
        restart the count. Raises IndexError past the end."""
        lane = self.piece_of_step(step).lane
        return lane, step - self.first_steps[lane]

    def lr_fraction(self, step: int) -> float:
        """Learning rate of a step as a fraction of optimizer.lr."""
        piece = self.piece_of_step(step)
        return piece.curve.at(piece.tokens_after(step - piece.first_step + 1))

    def tokens_after(self, num_steps: int) -> int:
        """Tokens of the whole run that are trained after `num_steps` steps."""
        lengths = ((piece, min(num_steps, piece.end_step) - piece.first_step) for piece in self.pieces)
        return sum(length * piece.stage.global_batch_tokens for piece, length in lengths if length > 0)

    def position(self, num_steps: int) -> dict[str, int | str]:
        """Where a run is after `num_steps` steps: step, stage, tokens trained in the stage, next position in its data,
        tokens of the run."""
        piece = self.piece_of_step(max(num_steps - 1, 0))
        local = num_steps - piece.first_step
        return {
            "step": num_steps,
            "stage": piece.stage.name,
            "tokens_of_stage": piece.tokens_after(local),
            "next_sequence_of_stage": piece.next_position(local),
            "tokens": self.tokens_after(num_steps),
        }

    def resumed(
        self, step: int, stages: Sequence[StageConfig], segment: int, left_out: Sequence[Window] = ()
    ) -> Schedule:
        """The schedule of a run that resumes after `step` steps with a configuration of these stages, and leaves out
        this data.

        The current stage is found by its name, or by its number if it was renamed. Raises ConfigError if the stage is
        missing, or if it now ends before the tokens already trained.
        """
        if step == 0:
            return Schedule(_plan(stages, 0, left_out, segment=segment, lane=0, first_step=0, start=0.0))
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
        left = max(-(-(new.num_tokens - tokens) // new.global_batch_tokens), 0)
        pieces = [*done]
        if left:
            end = tokens + left * new.global_batch_tokens
            same = (old.num_tokens, old.lr_end, old.lr_shape) == (new.num_tokens, new.lr_end, new.lr_shape)
            curve = (
                replace(last.curve, last_token=end)
                if same
                else LrCurve(new.lr_shape, fraction, new.lr_end, tokens, end)
            )
            position = last.next_position(last.num_steps)
            skipped = skipped_positions(new, left_out)
            end_position = position + left * new.global_batch_sequences + skipped_after(skipped, position)
            pieces.append(
                Piece(segment, index, new, last.lane, step, left, position, end_position, tokens, curve, skipped)
            )
        # exactly lr_end after a stage that has ended, despite rounding in its last step
        start = new.lr_end if left else last.curve.end if tokens == last.curve.last_token else fraction
        first_step, lane = pieces[-1].end_step, last.lane + 1
        later = _plan(stages, index + 1, left_out, segment=segment, lane=lane, first_step=first_step, start=start)
        return Schedule([*pieces, *later])


def present_stage(piece: Piece, stages: Sequence[StageConfig]) -> int:
    """Index of a piece's stage in another configuration. Raises ConfigError if that has no such stage."""
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
    stages: Sequence[StageConfig],
    first: int,
    left_out: Sequence[Window],
    *,
    segment: int,
    lane: int,
    first_step: int,
    start: float,
) -> list[Piece]:
    """Pieces of the stages that have not begun, from number `first` on; `start`: learning rate fraction at which they
    begin."""
    pieces = []
    for index, stage in enumerate(stages[first:], start=first):
        steps = stage.num_steps
        curve = LrCurve(stage.lr_shape, start, stage.lr_end, 0, steps * stage.global_batch_tokens)
        skipped = skipped_positions(stage, left_out)
        end_position = steps * stage.global_batch_sequences + skipped_after(skipped, 0)
        number = lane + index - first
        pieces.append(Piece(segment, index, stage, number, first_step, steps, 0, end_position, 0, curve, skipped))
        first_step, start = first_step + steps, stage.lr_end
    return pieces


def _refuse_shorter(index: int, old: StageConfig, new: StageConfig, tokens: int, step: int) -> None:
    """Raise ConfigError if the new stage ends before the tokens already trained in it."""
    if (
        new.num_tokens < old.num_tokens
        and -(-new.num_tokens // old.global_batch_tokens) * old.global_batch_tokens < tokens
    ):
        rule = f"{tokens:,} tokens of stage {new.name} are trained after step {step}, so it cannot end before them"
        hint = f"use at least {tokens}, or branch from an earlier checkpoint with --from-step"
        raise ConfigError("the run cannot continue", [Problem(f"stages.{index}.tokens", new.num_tokens, rule, hint)])
