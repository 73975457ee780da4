"""How well a model finds things in long texts, by length and depth; and how surely it could, if it is too small to
answer: the loss of the right answer, given to it token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.haystacks import NEW_TOKENS, TASKS, WITH_A_NEEDLE, Language, make, match
from hunyuan_pretrain.evaluation.opened import Opened
from hunyuan_pretrain.evaluation.scoring import sequence_item


@dataclass(frozen=True)
class Plan:
    """What is asked."""

    tasks: tuple[str, ...] = TASKS
    languages: tuple[Language, ...] = ("en", "zh")
    lengths: tuple[int, ...] = (4096,)
    """Tokens of prompt and answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    """For each task, language and length, and each depth of tasks with a needle."""
    chat: bool = False
    by_loss: bool = False
    """Score the right answer instead of generating one."""
    seed: int = 1234

    def cells(self) -> Iterator[tuple[str, Language, int, float | None]]:
        """(task, language, length, depth), depth None where there is no needle."""
        for task in self.tasks:
            for language in self.languages:
                for length in self.lengths:
                    for depth in self.depths if task in WITH_A_NEEDLE else (None,):
                        yield task, language, length, depth


def check(plan: Plan, max_length: int | None = None) -> None:
    """Raise EvaluationError for a plan that cannot be carried out; max_length: of the model, once it is known."""
    problems = [f"{task}: no such task; they are {', '.join(TASKS)}" for task in plan.tasks if task not in TASKS]
    problems += [f"{name}: no such language; use en, zh" for name in plan.languages if name not in ("en", "zh")]
    problems += [f"depth {depth:g}: use 0 to 1" for depth in plan.depths if not 0 <= depth <= 1]
    if plan.by_loss and (without := [task for task in plan.tasks if task in TASKS and task not in WITH_A_NEEDLE]):
        problems.append(
            f"{', '.join(without)}: no single answer whose loss says something; use {', '.join(WITH_A_NEEDLE)}"
        )
    if max_length is not None and (longer := [length for length in plan.lengths if length > max_length]):
        problems.append(f"lengths {', '.join(map(str, longer))}: the model has {max_length} positions")
    if problems:
        raise EvaluationError("\n".join(problems))


def run(opened: Opened, plan: Plan, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """One record for each cell: `task`, `language`, `length`, `depth`, `samples`, and `score` (share of what had to be
    found, 0 to 1), or `loss` and `loss_without` (nats per token of the right answer, and where the text has another
    value in its place). Raises EvaluationError."""
    check(plan, opened.scorer.max_length)
    records = []
    for task, language, length, depth in plan.cells():
        measured = (
            _losses(opened, plan, task, language, length, depth)
            if plan.by_loss
            else _score(opened, plan, task, language, length, depth)
        )
        where = {"task": task, "language": language, "length": length, "depth": depth, "samples": plan.samples}
        records.append({**where, **measured})
        if say is not None:
            at = "" if depth is None else f", depth {depth:.0%}"
            say(f"{task} {language}, {length:,} tokens{at}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    return records


def encoder(opened: Opened, chat: bool) -> Callable[[str, str], list[int]]:
    """(prompt, answer prefix) -> tokens: of a document that begins with them, or of a user's turn and an answer that
    begins with the prefix."""
    lm = opened.lm

    def encode(prompt: str, prefix: str) -> list[int]:
        if chat:
            return list(lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": prompt}]) + prefix))
        return list(lm.tok_encode(f"{prompt}{prefix}"))

    return encode


def _seed(plan: Plan, task: str, language: str, length: int, depth: float | None, sample: int) -> str:
    return f"{plan.seed} {task} {language} {length} {depth} {sample}"


def _score(
    opened: Opened, plan: Plan, task: str, language: Language, length: int, depth: float | None
) -> dict[str, float]:
    from lm_eval.api.instance import Instance

    encode, new = encoder(opened, plan.chat), NEW_TOKENS[task]
    made = [
        make(task, language, length - new, encode, _seed(plan, task, language, length, depth, sample), depth or 0.0)
        for sample in range(plan.samples)
    ]
    options = {"until": [], "max_gen_toks": new, "do_sample": False}
    texts = [_text(opened, plan.chat, one.prompt, one.answer_prefix) for one in made]
    requests = [Instance("generate_until", {}, (text, dict(options)), place) for place, text in enumerate(texts)]
    answers = opened.lm.generate_until(requests)
    return {"score": sum(match(text, one.references) for text, one in zip(answers, made, strict=True)) / len(made)}


def _text(opened: Opened, chat: bool, prompt: str, prefix: str) -> str:
    if chat:
        return str(opened.lm.apply_chat_template([{"role": "user", "content": prompt}])) + prefix
    return f"{prompt}{prefix}"


def _losses(
    opened: Opened, plan: Plan, task: str, language: Language, length: int, depth: float | None
) -> dict[str, float]:
    encode, new = encoder(opened, plan.chat), NEW_TOKENS[task]
    items = []
    for sample in range(plan.samples):
        seed = _seed(plan, task, language, length, depth, sample)
        for swapped in (False, True):
            one = make(task, language, length - new, encode, seed, depth or 0.0, swapped=swapped)
            prompt = encode(one.prompt, one.answer_prefix)
            space = " " if language == "en" else ""
            answer = opened.lm.tok_encode(space + one.references[0], add_special_tokens=False)
            items.append(sequence_item([*prompt, *answer], len(prompt)))
    means = [-float(read.logprob_n.mean()) for read in opened.scorer.score(items)]
    return {
        "loss": sum(means[::2]) / plan.samples,
        "loss_without": sum(means[1::2]) / plan.samples,
    }


def plan(
    lengths: str, tasks: str | None, languages: str, depths: str, samples: int, chat: bool, by_loss: bool, seed: int
) -> Plan:
    """The plan that the command's options ask for. Raises EvaluationError for what is not a number."""

    def numbers(option: str, text: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
        try:
            return tuple(read(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise EvaluationError(f"{option} {text}: not numbers with commas between them") from None

    def tokens(part: str) -> int:
        return int(part[:-1]) * 1024 if part[-1:] in "kK" else int(part)

    names = tuple(name.strip() for name in tasks.split(",")) if tasks else WITH_A_NEEDLE if by_loss else TASKS
    return Plan(
        names,
        tuple(name.strip() for name in languages.split(",")),
        numbers("--lengths", lengths, tokens),
        numbers("--depths", depths, float),
        samples,
        chat,
        by_loss,
        seed,
    )


def heat_maps(records: Sequence[dict[str, Any]], by_loss: bool) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, table of depth against length) of each task and language; tasks without a needle have one line."""
    maps = []
    for title, lengths, depths, cells in _grids(records):
        rows: list[tuple[str, ...]] = [("depth", *(f"{length:,}" for length in lengths))]
        for depth in depths:
            shown = [_shown(cells[depth, length], by_loss) for length in lengths]
            rows.append(("all" if depth is None else f"{depth:.0%}", *shown))
        maps.append((title, rows))
    return maps


Grid = tuple[str, list[int], list[float | None], dict[tuple[float | None, int], dict[str, Any]]]


def _grids(records: Sequence[dict[str, Any]]) -> Iterator[Grid]:
    """(title, lengths, depths, records by depth and length) of each task and language."""
    for task, language in dict.fromkeys((record["task"], record["language"]) for record in records):
        mine = [record for record in records if (record["task"], record["language"]) == (task, language)]
        lengths = sorted({record["length"] for record in mine})
        depths: list[float | None] = sorted({record["depth"] for record in mine}, key=lambda depth: depth or 0.0)
        yield f"{task}, {language}", lengths, depths, {(one["depth"], one["length"]): one for one in mine}


def _shown(record: dict[str, Any], by_loss: bool) -> str:
    if not by_loss:
        return f"{100 * record['score']:.1f}"
    return f"{record['loss']:.3f} ({record['loss_without']:.3f})"


def write(records: Sequence[dict[str, Any]], asked: Plan, opened: Opened, out: Path | None, plot: Path | None) -> None:
    """Write the records as JSON and draw them, where files are given."""
    if out is not None:
        content = {**opened.facts, "chat_template": asked.chat, "seed": asked.seed, "cells": list(records)}
        write_whole(out, json.dumps(content, indent=1) + "\n")
    if plot is not None:
        _draw(records, asked.by_loss, plot)


def _draw(records: Sequence[dict[str, Any]], by_loss: bool, path: Path) -> None:
    """One map for each task and language: percent found, or how much lower the loss is with the right needle."""
    from matplotlib.figure import Figure

    grids = list(_grids(records))
    figure = Figure(figsize=(4.5 * min(len(grids), 3), 3.2 * -(-len(grids) // 3)), layout="constrained")
    for number, (title, lengths, depths, cells) in enumerate(grids, start=1):
        axes = figure.add_subplot(-(-len(grids) // 3), min(len(grids), 3), number)
        rows = [[cells[depth, length] for length in lengths] for depth in depths]
        values = [[one["loss_without"] - one["loss"] if by_loss else 100 * one["score"] for one in row] for row in rows]
        lowest, highest = (None, None) if by_loss else (0, 100)
        image = axes.imshow(values, aspect="auto", cmap="RdYlGn", vmin=lowest, vmax=highest)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), ["all" if each is None else f"{each:.0%}" for each in depths], fontsize=7)
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("depth of the needle" if depths != [None] else "", fontsize=8)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150, format="png")
