"""Rules for the data of stages and of validation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment, StageConfig


def tiers_are_whole(experiment: Experiment) -> Iterator[Problem]:
    """tier_weights names every tier of its stage's sources, and no other."""
    for number, stage in enumerate(experiment.stages):
        tiers = {source.tier for source in stage.data}
        if stage.tier_weights is None:
            if tiers != {None}:
                named = ", ".join(sorted(tier for tier in tiers if tier))
                yield Problem(
                    f"stages.{number}.data",
                    Problem.NO_VALUE,
                    f"tier {named}: " + "tiers have no effect without tier_weights",
                    "give it, or remove tier",
                )
            continue
        for index, source in enumerate(stage.data):
            if source.tier not in stage.tier_weights:
                known = ", ".join(stage.tier_weights) or "none"
                yield Problem(
                    f"stages.{number}.data.{index}.tier", source.tier, "not in tier_weights", f"which has {known}"
                )
        for tier in stage.tier_weights:
            if tier not in tiers:
                yield Problem(
                    f"stages.{number}.tier_weights.{tier}",
                    stage.tier_weights[tier],
                    "no source of the stage has this tier",
                )


def skipped_steps_are_in_order(experiment: Experiment) -> Iterator[Problem]:
    """Ranges of skip_data_steps are in ascending order and do not overlap."""
    for number, stage in enumerate(experiment.stages):
        end = 0
        for first, last in stage.skip_data_steps:
            where = f"stages.{number}.skip_data_steps"
            if first > last:
                yield Problem(where, [first, last], "a range is [first, last]", f"use [{last}, {first}]")
            elif first <= end:
                yield Problem(
                    where,
                    [first, last],
                    "begins before the previous range ends",
                    f"use {end + 1} or more, or join them",
                )
            end = max(end, last)


def groups_fill_the_batch(experiment: Experiment) -> Iterator[Problem]:
    """balance_group_sequences needs balance_attention=group and divides the batch."""
    for number, stage in enumerate(experiment.stages):
        group = stage.balance_group_sequences
        where = f"stages.{number}.balance_group_sequences"
        if group is None:
            continue
        if stage.balance_attention != "group":
            yield Problem(where, group, "has no effect without balance_attention=group", "set that, or remove this")
        elif stage.global_batch_sequences % group:
            divisors = [
                size for size in range(1, stage.global_batch_sequences + 1) if stage.global_batch_sequences % size == 0
            ]
            nearest = min(divisors, key=lambda size: abs(size - group))
            yield Problem(
                where, group, f"must divide global_batch_sequences={stage.global_batch_sequences}", f"use {nearest}"
            )


def validation_sets_have_names_of_their_own(experiment: Experiment) -> Iterator[Problem]:
    """Names of evaluation.sets become parts of metric names: they must be unique, without characters that a sink takes
    for a separator."""
    first: dict[str, int] = {}
    for number, one in enumerate(experiment.evaluation.sets):
        where = f"evaluation.sets.{number}.name"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", one.name):
            rule = "must consist of letters, digits, dots, hyphens and underscores: it becomes part of metric names"
            fitting = re.sub(r"[^A-Za-z0-9._-]+", "_", one.name).strip("._-")
            yield Problem(where, one.name, rule, f"use {fitting or f'set{number}'}")
        elif one.name in first:
            yield Problem(
                where, one.name, f"evaluation.sets.{first[one.name]} already has this name", f"use {one.name}_{number}"
            )
        first.setdefault(one.name, number)


def preferences_have_a_reference(experiment: Experiment) -> Iterator[Problem]:
    """A stage with task=dpo compares with the weights that the run starts from, routed as they are, in bf16 or fp32."""
    plain = StageConfig.model_fields
    for number, stage in enumerate(experiment.stages):
        where = f"stages.{number}"
        if stage.task != "dpo":
            for name in ("dpo_beta", "dpo_sft_weight"):
                if (value := getattr(stage, name)) != plain[name].default:
                    yield Problem(
                        f"{where}.{name}", value, "has no effect without task=dpo", "set that, or remove this"
                    )
            if any(one.task == "dpo" for one in experiment.stages):
                rule = (
                    "the reference of a stage with task=dpo is the start of the run, so all its stages have that task"
                )
                yield Problem(f"{where}.task", stage.task, rule, "make it a run of its own")
            continue
        if not stage.is_dropless:
            rule = "with a capacity, what a pair is given depends on the other pairs of its batch"
            yield Problem(f"{where}.routing", stage.routing, rule, "leave it out")
        if stage.rope_alpha != (first := experiment.stages[0].rope_alpha):
            rule = f"all stages with task=dpo have one reference, and stage {experiment.stages[0].name} has {first}"
            yield Problem(f"{where}.rope_alpha", stage.rope_alpha, rule, f"use {first}")
        if stage.loss_average != "tokens":
            rule = "has no effect with task=dpo, whose loss is a mean over pairs"
            yield Problem(f"{where}.loss_average", stage.loss_average, rule, "leave it out")
        for name in ("hidden_dropout", "attention_dropout"):
            if rate := getattr(stage, name):
                yield Problem(f"{where}.{name}", rate, "the reference of task=dpo is computed without", "use 0")
    if all(stage.task != "dpo" for stage in experiment.stages):
        return
    settings = experiment.checkpoint
    if settings.init_from is None and settings.resume_from is None:  # a branch has the reference of its run
        rule = "task=dpo compares with the weights that the run starts from"
        yield Problem("checkpoint.init_from", Problem.NO_VALUE, rule, "give a run, a checkpoint or an import")
    if experiment.tuning.lora is not None and (rate := experiment.tuning.lora.dropout):
        yield Problem("tuning.lora.dropout", rate, "the reference of task=dpo is computed without", "use 0")
    if experiment.precision.fp8_recipe is not None:
        rule = "with task=dpo, scales that change from step to step would move the log-probabilities"
        yield Problem("precision.fp8_recipe", experiment.precision.fp8_recipe, rule, "set it to null")
    every = experiment.optimizer.measure_noise_scale_every_steps
    if every is not None:
        rule = "not with task=dpo: it is measured on sums over tokens"
        yield Problem("optimizer.measure_noise_scale_every_steps", every, rule, "set it to null")


def tasks_are_named_once(experiment: Experiment) -> Iterator[Problem]:
    """Whether a name is known, and its files are there, is checked at the start of a run, with lm-eval."""
    settings = experiment.evaluation
    for number, name in enumerate(settings.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            rule = "must be the name of one task or group, as `hunyuan-pretrain evaluate --tasks` takes it"
            yield Problem(f"evaluation.tasks.{number}", name, rule, "one name each, such as piqa")
        elif name in settings.tasks[:number]:
            yield Problem(f"evaluation.tasks.{number}", name, "is named twice", "remove one")
    if {"hunyuan-base", "hunyuan-instruct"} <= set(settings.tasks):
        rule = "hunyuan-base is without the chat template, hunyuan-instruct with it: a run evaluates one of them"
        yield Problem("evaluation.tasks", list(settings.tasks), rule, "remove one")
    for key in ("tasks_every_steps", "tasks_data", "tasks_limit"):
        if not settings.tasks and (value := getattr(settings, key)) is not None:
            yield Problem(
                f"evaluation.{key}", value, "has no effect without evaluation.tasks", "name tasks, or remove this"
            )


DATA_RULES = (
    preferences_have_a_reference,
    tasks_are_named_once,
    groups_fill_the_batch,
    tiers_are_whole,
    skipped_steps_are_in_order,
    validation_sets_have_names_of_their_own,
)
