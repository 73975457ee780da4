"""What may change between two segments of a run: a table of settings, and the comparison that uses it.

Every setting of the schema is covered by a line of the table. A change that no line covers is refused until the user
accepts it.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hunyuan_pretrain.config.describe import flatten
from hunyuan_pretrain.config.errors import show_value
from hunyuan_pretrain.config.history import Segment, SourceFacts
from hunyuan_pretrain.config.schedule import Piece, present_stage
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, StageConfig


class Kind(StrEnum):
    """What a change means for a run that resumes."""

    harmless = "harmless"
    """Does not affect training."""
    recorded = "recorded"
    """Allowed, and recorded in the run's history."""
    refused = "refused"
    """Allowed only with --accept-changes."""
    never = "never"
    """Never allowed: the weights would be those of another model."""


@dataclass(frozen=True)
class Difference:
    """A setting that differs from the previous segment."""

    key: str
    old: Any
    new: Any
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {show_value(self.old, LONGEST)} -> {show_value(self.new, LONGEST)} ({self.reason})"


ABSENT = "(absent)"
UNRECORDED = "(not recorded)"
LONGEST = 500
"""Characters of a value that are shown; paths and digests must not be cut."""

MEANING = "changes what the weights mean"
LOSS = "affects the losses or routing in training; the weights keep their meaning"
LAYOUT = "the layout"
OPTIMIZER = "takes effect from the next step"
STORED = "how fp32 main weights are stored; they keep their values"
AVERAGE = "from null it begins with the weights as they are now; with null the average so far is dropped"
MIXTURE = "the mixture changes from here on; each source continues where it stopped"
CONVERTED = "the moments are converted when they are loaded; bf16 rounds them once"

TABLE: tuple[tuple[str, Kind, str], ...] = (
    ("name", Kind.harmless, "a label"),
    ("run_dir", Kind.harmless, "where the run is stored"),
    (
        "seed",
        Kind.refused,
        "changes the order of the data: some sequences of the current epoch would be read twice, others not at all",
    ),
    ("tokenizer", Kind.harmless, "where the tokenizer is stored; its content is compared by digest"),
    ("tokenizer.digest", Kind.refused, "token ids would stand for other text than in training so far"),
    ("model.moe_aux_loss_coeff", Kind.recorded, LOSS),
    ("model.moe_z_loss_coeff", Kind.recorded, LOSS),
    ("model.moe_expert_capacity_factor", Kind.recorded, LOSS),
    ("model.recycle_routing", Kind.recorded, LOSS),
    ("model.moe_routing_group_tokens", Kind.recorded, LOSS),
    ("model.init_method_std", Kind.harmless, "only newly initialised weights depend on it"),
    ("model.num_layers", Kind.never, "changes the number of weights"),
    ("model.hidden_size", Kind.never, "changes the shape of the weights"),
    ("model.num_attention_heads", Kind.never, "changes the shape of the weights"),
    ("model.num_query_groups", Kind.never, "changes the shape of the weights"),
    ("model.kv_channels", Kind.never, "changes the shape of the weights"),
    ("model.ffn_hidden_size", Kind.never, "changes the shape of the weights"),
    ("model.moe_ffn_hidden_size", Kind.never, "changes the shape of the weights"),
    ("model.num_moe_experts", Kind.never, "changes the number of weights"),
    ("model.moe_router_topk", Kind.never, MEANING),
    ("model.cla_share_factor", Kind.never, "changes the number of weights"),
    ("model.qk_layernorm", Kind.never, "changes the number of weights"),
    ("model.layernorm_epsilon", Kind.never, MEANING),
    ("model.rotary_base", Kind.never, MEANING),
    ("model.padded_vocab_size", Kind.never, "changes the shape of the weights"),
    ("model.share_embeddings_and_output_weights", Kind.never, "changes the number of weights"),
    ("tuning.lora.adapter", Kind.harmless, "where the run started"),
    ("tuning.lora.dropout", Kind.recorded, LOSS),
    (
        "tuning.*",
        Kind.never,
        "other weights would be trained, without optimizer state; a new run can start from the weights: "
        "checkpoint.init_from",
    ),
    ("parallel.*", Kind.recorded, LAYOUT),
    (
        "precision.dtype",
        Kind.never,
        "the optimizer state is for another format; a new run can start from the weights: checkpoint.init_from",
    ),
    ("precision.*", Kind.recorded, "number formats of the matmuls"),
    ("optimizer.lr", Kind.recorded, "scales the learning rate from the next step on"),
    ("optimizer.use_precision_aware_optimizer", Kind.recorded, STORED),
    ("optimizer.ema_decay", Kind.recorded, AVERAGE),
    ("optimizer.exp_avg_dtype", Kind.recorded, CONVERTED),
    ("optimizer.exp_avg_sq_dtype", Kind.recorded, CONVERTED),
    ("optimizer.*", Kind.recorded, OPTIMIZER),
    ("stages", Kind.recorded, "stages that begin later"),
    (
        "stages.order",
        Kind.refused,
        "stages that have ended would be trained again, or stages still to come would be left out",
    ),
    ("stages.N.name", Kind.harmless, "a label"),
    ("stages.N.task", Kind.refused, "the rest of the stage would be trained on something else"),
    ("stages.N.dpo_*", Kind.recorded, LOSS),
    ("stages.N.loss_average", Kind.recorded, LOSS),
    ("stages.N.routing", Kind.recorded, LOSS),
    ("stages.N.*_dropout", Kind.recorded, LOSS),
    ("stages.N.tokens", Kind.recorded, "the length of the stage; its learning rate continues from the current value"),
    ("stages.N.epochs", Kind.recorded, "the length of the stage, as tokens"),
    ("stages.N.sequence_length", Kind.refused, "the current stage would continue with different sequences"),
    ("stages.N.global_batch_sequences", Kind.recorded, "the stage continues at the sequence that it has reached"),
    ("stages.N.micro_batch_sequences", Kind.recorded, LAYOUT),
    ("stages.N.rope_alpha", Kind.recorded, "positions are encoded differently from the next step on"),
    ("stages.N.lr_end", Kind.recorded, "the learning rate goes there from its current value"),
    ("stages.N.lr_shape", Kind.recorded, "the learning rate continues from its current value"),
    ("stages.N.data", Kind.recorded, MIXTURE),
    ("stages.N.data.path", Kind.harmless, "the same data, stored elsewhere"),
    (
        "stages.N.data.digest",
        Kind.refused,
        "packed again since it was read: what was already read may come again in other sequences",
    ),
    ("stages.N.data.weight", Kind.recorded, MIXTURE),
    ("stages.N.data.tier", Kind.recorded, MIXTURE),
    ("stages.N.data.max_epochs", Kind.recorded, "a limit on what is read"),
    ("stages.N.tier_weights", Kind.recorded, MIXTURE),
    ("stages.N.balance_attention", Kind.recorded, "which rank takes which sequence of a batch"),
    (
        "stages.N.balance_group_sequences",
        Kind.refused,
        "changes the order of the data: sequences of the current epoch would be read twice or not at all; restore the "
        "old value",
    ),
    ("stages.N.skip_data_steps", Kind.recorded, "which data is skipped"),
    ("world_size", Kind.recorded, LAYOUT),
    ("versions.*", Kind.recorded, "the program"),
    ("evaluation.tasks*", Kind.harmless, "which benchmarks are run, and when"),
    ("evaluation.*", Kind.harmless, "what is validated; compare validation losses before and after with care"),
    ("checkpoint.*", Kind.harmless, "what is saved"),
    ("logging.*", Kind.harmless, "what is logged"),
    ("runtime.deterministic", Kind.recorded, "whether a rerun gives the same numbers"),
    ("runtime.transformer_engine", Kind.recorded, "which kernels compute"),
    ("runtime.kernels", Kind.recorded, "which kernels compute"),
    ("runtime.attention_backend", Kind.recorded, "which kernels compute attention"),
    ("attention.*", Kind.recorded, "which kernels compute attention; they round differently"),
    ("runtime.*", Kind.harmless, "the machine"),
    ("resilience.rerun_every", Kind.harmless, "how often a step is checked"),
    ("resilience.*", Kind.recorded, "what is done about bad steps from here on"),
)
"""(pattern of dotted keys, kind, reason); the first match counts. N is the number of any stage. Besides settings, the
table covers what a run finds: digests of data and tokenizer, the number of ranks, versions, attention backends."""

OVER = "the stage is over: no effect"
LATER = "the stage begins later"


def sort(key: str) -> tuple[Kind, str]:
    """(kind, reason) of a change to a setting; a setting that is not in the table is refused."""
    general = ".".join("N" if name.isdecimal() else name for name in key.split("."))
    for pattern, kind, reason in TABLE:
        if fnmatch.fnmatchcase(general, pattern):
            return kind, reason
    return Kind.refused, "its effect has not been classified"


def differences(old: Experiment, new: Experiment, present: Piece) -> list[Difference]:
    """Settings that changed from the previous segment to the one that resumes it. `present`: the piece of the last
    step.

    The current stage is compared with the new stage of the same name, or of the same number if the name is gone. Raises
    ConfigError if there is neither.
    """
    left, right = (flatten(_without_stages(*pair)) for pair in ((old, new), (new, old)))
    found = [
        _difference(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)
    ]
    here = present_stage(present, new.stages)
    for index, stage in enumerate(new.stages):
        before = next((one for one in old.stages if one.name == stage.name), None)
        if index == here:
            found += _stage_differences(index, present.stage, stage)
        elif before is None:
            reason = "a stage before the current one: no effect" if index < here else LATER
            found.append(Difference(f"stages.{index}", ABSENT, stage.name, Kind.recorded, reason))
        else:
            reason, kind = (OVER, Kind.harmless) if index < here else (LATER, Kind.recorded)
            found += [replace(one, kind=kind, reason=reason) for one in _stage_differences(index, before, stage)]
    found += _order_differences(old, new, present, here)
    names = {stage.name for stage in new.stages} | {present.stage.name}
    found += [
        Difference(
            "stages",
            stage.name,
            ABSENT,
            Kind.recorded,
            OVER if number <= present.index else "a stage that would have come later",
        )
        for number, stage in enumerate(old.stages)
        if stage.name not in names
    ]
    return found


def _order_differences(old: Experiment, new: Experiment, present: Piece, here: int) -> list[Difference]:
    """A changed order of the stages that both have; refused if a stage moves from before the current one to after it,
    or the reverse."""
    before = {stage.name: number for number, stage in enumerate(old.stages) if stage.name != present.stage.name}
    now = {stage.name: index for index, stage in enumerate(new.stages) if stage.name in before and index != here}
    if any((before[name] > present.index) != (index > here) for name, index in now.items()):
        shared = {*now, present.stage.name, new.stages[here].name}
        names = (tuple(stage.name for stage in one.stages if stage.name in shared) for one in (old, new))
        return [_difference("stages.order", *names)]
    left = tuple(name for name in before if name in now and before[name] > present.index)
    right = tuple(name for name in now if before[name] > present.index)
    return [] if left == right else [Difference("stages.order", left, right, Kind.recorded, LATER)]


def model_differences(old: Mapping[str, Any], new: ModelConfig) -> list[Difference]:
    """Architecture settings that differ from a checkpoint's model, each with its kind. Two spellings of the same shape
    are not a difference."""
    theirs = ModelConfig.model_validate({key: value for key, value in old.items() if key in ModelConfig.model_fields})
    before, now = _spelled_out(theirs, new), _spelled_out(new, theirs)
    return [_difference(f"model.{key}", before[key], now[key]) for key in now if before[key] != now[key]]


def source_differences(
    old: Mapping[str, SourceFacts], new: Mapping[str, SourceFacts], experiment: Experiment
) -> list[Difference]:
    """Data whose content changed under the same path since the previous segment, and data that moved, recognised by its
    digest."""
    found = []
    digests = {facts.digest: path for path, facts in old.items() if facts.digest}
    for path, facts in new.items():
        index = next(
            (i for i, stage in enumerate(experiment.stages) for source in stage.data if _norm(source.path) == path), 0
        )
        before = old.get(path)
        if before is not None and None not in (before.digest, facts.digest) and before.digest != facts.digest:
            key, values = f"stages.{index}.data.digest", (f"{path} {_short(before)}", f"{path} {_short(facts)}")
            found.append(_difference(key, *values))
        elif before is None and facts.digest in digests and digests[facts.digest] not in new:
            found.append(_difference(f"stages.{index}.data.path", digests[facts.digest], path))
    return found


def _packed_again(old: Segment, new: Segment, present: Piece) -> list[Difference]:
    """Data that the current stage reads from a new path, in place of data at another path with some of the same
    documents."""
    here = present_stage(present, new.config.stages)
    left, right = ([_norm(source.path) for source in stage.data] for stage in (present.stage, new.config.stages[here]))
    gone = [path for path in left if path in old.sources and path not in right]
    found = []
    for path in (path for path in right if path in new.sources and path not in left):
        corpora = {document[0] for document in new.sources[path].documents}
        known = {facts.digest for facts in old.sources.values() if facts.digest}
        if new.sources[path].digest in known:
            continue  # it has only moved
        for other in (other for other in gone if corpora & {document[0] for document in old.sources[other].documents}):
            values = f"{other} {_short(old.sources[other])}", f"{path} {_short(new.sources[path])}"
            found.append(_difference(f"stages.{here}.data.digest", *values))
    return found


def all_differences(old: Segment, new: Segment, present: Piece) -> list[Difference]:
    """All differences between a segment and the previous one; `present`: the piece of the last step. Raises
    ConfigError as `differences` does."""
    of_data = source_differences(old.sources, new.sources, new.config)
    of_data += _packed_again(old, new, present)
    moved = {path for one in of_data if one.key.endswith(".data.path") for path in (one.old, one.new)}
    found = [
        one
        for one in differences(old.config, new.config, present)
        if not (one.key.endswith(".data") and {one.old, one.new} & moved)
    ]
    found += of_data
    if None not in (old.tokenizer_digest, new.tokenizer_digest) and old.tokenizer_digest != new.tokenizer_digest:
        found.append(_difference("tokenizer.digest", str(old.tokenizer_digest)[:12], str(new.tokenizer_digest)[:12]))
    if old.world_size not in (None, new.world_size):
        found.append(_difference("world_size", old.world_size, new.world_size))
    for name, version in new.versions.items():
        if old.versions and old.versions.get(name) != version:
            found.append(_difference(f"versions.{name}", old.versions.get(name), version))
    return found


def attention_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[Difference]:
    """Attention backends (Segment.attention) that are not those recorded, or of which none are recorded."""
    return [
        _difference(f"attention.{kind}", old.get(kind, UNRECORDED), new.get(kind, ABSENT))
        for kind in {**old, **new}
        if new.get(kind) != old.get(kind)
    ]


def _difference(key: str, old: Any, new: Any) -> Difference:
    kind, reason = sort(key)
    return Difference(key, old, new, kind, reason)


def _without_stages(experiment: Experiment, other: Experiment) -> dict[str, Any]:
    fields = experiment.model_dump(mode="json")
    del fields["stages"]
    fields["model"] = _spelled_out(experiment.model, other.model)
    return {section: _whole_lists(content) for section, content in fields.items()}


def _whole_lists(content: Any) -> Any:
    """Lists become tuples and so count as one value: a single element has no meaning."""
    if isinstance(content, dict):
        return {key: _whole_lists(value) for key, value in content.items()}
    return tuple(content) if isinstance(content, list) else content


def _spelled_out(model: ModelConfig, other: ModelConfig) -> dict[str, Any]:
    """Settings of a model. A setting that is null in only one of the two models gets the value that null stands for."""
    derived = {"kv_channels": model.head_dim, "moe_ffn_hidden_size": model.expert_ffn_size}
    return model.model_dump() | {
        key: value for key, value in derived.items() if (getattr(model, key) is None) != (getattr(other, key) is None)
    }


def _stage_differences(index: int, old: StageConfig, new: StageConfig) -> list[Difference]:
    found = []
    for name in StageConfig.model_fields:
        before, now = _effective(old, name), _effective(new, name)
        if name == "data":
            found += _data_differences(index, old, new)
        elif before != now:
            found.append(_difference(f"stages.{index}.{name}", before, now))
    return found


def _effective(stage: StageConfig, name: str) -> Any:
    if name == "balance_group_sequences":  # the value that decides the order of the data
        return (
            (stage.balance_group_sequences or stage.global_batch_sequences)
            if stage.balance_attention == "group"
            else None
        )
    return getattr(stage, name)


def _data_differences(index: int, old: StageConfig, new: StageConfig) -> list[Difference]:
    left, right = ({_norm(source.path): source for source in stage.data} for stage in (old, new))
    found = []
    for path in {**left, **right}:
        if path not in left or path not in right:
            found.append(
                _difference(f"stages.{index}.data", path if path in left else ABSENT, path if path in right else ABSENT)
            )
            continue
        for name in ("weight", "max_epochs", "tier"):
            before, now = getattr(left[path], name), getattr(right[path], name)
            if before != now:
                kind, reason = sort(f"stages.{index}.data.{name}")
                found.append(
                    Difference(
                        f"stages.{index}.data.{name}",
                        f"{path} {show_value(before)}",
                        f"{path} {show_value(now)}",
                        kind,
                        reason,
                    )
                )
    return found


def _norm(path: str) -> str:
    return os.path.normpath(path)


def _short(facts: SourceFacts) -> str:
    return f"{str(facts.digest)[:12]}..."
