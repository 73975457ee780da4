"""What may change between two segments of a run: one table, and the comparison that it sorts.

Every setting of the schema has one line that covers it; what nobody has thought of counts as refused until it is
accepted by hand.
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
    """What a change means for a run that goes on."""

    harmless = "harmless"
    """Changes nothing of what is trained."""
    recorded = "recorded"
    """Allowed; it is in the history of the run from then on."""
    refused = "refused"
    """Only with --accept-changes."""
    never = "never"
    """The weights would be those of another model."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not what it was in the segment before."""

    key: str
    old: Any
    new: Any
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {show_value(self.old, LONGEST)} -> {show_value(self.new, LONGEST)} ({self.reason})"


ABSENT = "(absent)"
LONGEST = 500
"""Characters of a value that are shown: a path and a digest must be whole."""

MEANING = "the weights mean something else with it"
LOSS = "a setting of the losses or of routing while training; the weights stay what they are"
LAYOUT = "the layout"
OPTIMIZER = "takes effect from the next step"

TABLE: tuple[tuple[str, Kind, str], ...] = (
    ("name", Kind.harmless, "a label"),
    ("run_dir", Kind.harmless, "where the run lies"),
    (
        "seed",
        Kind.refused,
        "the data gets another order: some sequences of the present epoch would be read twice, others not at all",
    ),
    ("tokenizer", Kind.harmless, "where the tokenizer lies; what is in it is compared by its digest"),
    ("tokenizer.digest", Kind.refused, "ids mean other text than those that were trained on"),
    ("model.moe_aux_loss_coeff", Kind.recorded, LOSS),
    ("model.moe_z_loss_coeff", Kind.recorded, LOSS),
    ("model.moe_expert_capacity_factor", Kind.recorded, LOSS),
    ("model.recycle_routing", Kind.recorded, LOSS),
    ("model.moe_routing_group_tokens", Kind.recorded, LOSS),
    ("model.init_method_std", Kind.harmless, "only weights that begin anew are drawn with it"),
    ("model.num_layers", Kind.never, "another number of weights"),
    ("model.hidden_size", Kind.never, "another shape of the weights"),
    ("model.num_attention_heads", Kind.never, "another shape of the weights"),
    ("model.num_query_groups", Kind.never, "another shape of the weights"),
    ("model.kv_channels", Kind.never, "another shape of the weights"),
    ("model.ffn_hidden_size", Kind.never, "another shape of the weights"),
    ("model.moe_ffn_hidden_size", Kind.never, "another shape of the weights"),
    ("model.num_moe_experts", Kind.never, "another number of weights"),
    ("model.moe_router_topk", Kind.never, MEANING),
    ("model.cla_share_factor", Kind.never, "another number of weights"),
    ("model.qk_layernorm", Kind.never, "another number of weights"),
    ("model.layernorm_epsilon", Kind.never, MEANING),
    ("model.rotary_base", Kind.never, MEANING),
    ("model.padded_vocab_size", Kind.never, "another shape of the weights"),
    ("model.share_embeddings_and_output_weights", Kind.never, "another number of weights"),
    ("parallel.*", Kind.recorded, LAYOUT),
    (
        "precision.dtype",
        Kind.never,
        "the optimizer's state is that of another format; a new run can take the weights: checkpoint.init_from",
    ),
    ("precision.*", Kind.recorded, "number formats of the products"),
    ("optimizer.lr", Kind.recorded, "the learning rate is multiplied from the next step on"),
    ("optimizer.*", Kind.recorded, OPTIMIZER),
    ("stages", Kind.recorded, "stages that begin later"),
    (
        "stages.order",
        Kind.refused,
        "what is over would be trained again, or what was to come never",
    ),
    ("stages.N.name", Kind.harmless, "a label"),
    ("stages.N.tokens", Kind.recorded, "the length of the stage; its learning rate goes on from the present one"),
    ("stages.N.sequence_length", Kind.refused, "the present stage would go on with other sequences than it began with"),
    ("stages.N.global_batch_sequences", Kind.recorded, "the stage goes on at the sequence that it has come to"),
    ("stages.N.micro_batch_sequences", Kind.recorded, LAYOUT),
    ("stages.N.rope_alpha", Kind.recorded, "positions are seen otherwise from the next step on"),
    ("stages.N.lr_end", Kind.recorded, "the learning rate goes there from the present one"),
    ("stages.N.lr_shape", Kind.recorded, "the learning rate goes on from the present one"),
    ("stages.N.data", Kind.recorded, "the mix is another one from here on; each source goes on where it stopped"),
    ("stages.N.data.path", Kind.harmless, "the same data lies somewhere else"),
    (
        "stages.N.data.digest",
        Kind.refused,
        "packed again since it was read: what was read of it may come again in other sequences",
    ),
    (
        "stages.N.data.weight",
        Kind.recorded,
        "the mix is another one from here on; each source goes on where it stopped",
    ),
    ("stages.N.data.tier", Kind.recorded, "the mix is another one from here on; each source goes on where it stopped"),
    ("stages.N.data.max_epochs", Kind.recorded, "a limit on what is read"),
    (
        "stages.N.tier_weights",
        Kind.recorded,
        "the mix is another one from here on; each source goes on where it stopped",
    ),
    ("stages.N.balance_attention", Kind.recorded, "who takes which sequence of a batch"),
    (
        "stages.N.balance_group_sequences",
        Kind.refused,
        "another order of the data: sequences of the present epoch would be read twice or not at all; set it to "
        "what it was",
    ),
    ("stages.N.skip_data_steps", Kind.recorded, "other data is left out"),
    ("world_size", Kind.recorded, LAYOUT),
    ("versions.*", Kind.recorded, "the program"),
    ("evaluation.*", Kind.harmless, "what is validated; compare validation losses before and after with care"),
    ("checkpoint.*", Kind.harmless, "what is saved"),
    ("logging.*", Kind.harmless, "what is logged"),
    ("runtime.deterministic", Kind.recorded, "whether the same start gives the same numbers"),
    ("runtime.transformer_engine", Kind.recorded, "which kernels compute"),
    ("runtime.*", Kind.harmless, "the machine"),
)
"""(pattern of dotted keys, kind, reason); the first that fits counts. N is the number of any stage. Besides settings
there are what a run
meets: digests of data and tokenizer, the number of ranks, versions."""

OVER = "the stage is over: no effect"
LATER = "the stage begins later"


def sort(key: str) -> tuple[Kind, str]:
    """The kind of a change of a setting, and why; a setting that is not in the table is refused."""
    general = ".".join("N" if name.isdecimal() else name for name in key.split("."))
    for pattern, kind, reason in TABLE:
        if fnmatch.fnmatchcase(general, pattern):
            return kind, reason
    return Kind.refused, "nobody has said what it changes"


def differences(old: Experiment, new: Experiment, present: Piece) -> list[Difference]:
    """Settings in which a run that goes on differs from its segment before; `present`: the piece of its last step.

    The present stage is compared with the stage of its name, or where that is gone, of its number; raises ConfigError
    if there is none.
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
            reason = "a stage before the present one: no effect" if index < here else LATER
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
    """Another order of the stages that both have; refused where a stage was on the other side of the present one."""
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
    """Settings of the architecture in which the model of a checkpoint differs, sorted; two spellings of one shape are
    no difference."""
    theirs = ModelConfig.model_validate({key: value for key, value in old.items() if key in ModelConfig.model_fields})
    before, now = _spelled_out(theirs, new), _spelled_out(new, theirs)
    return [_difference(f"model.{key}", before[key], now[key]) for key in now if before[key] != now[key]]


def source_differences(
    old: Mapping[str, SourceFacts], new: Mapping[str, SourceFacts], experiment: Experiment
) -> list[Difference]:
    """Data that is not what the segment before met under the same path, and data that has moved, which its digest
    tells."""
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
    """Data that the present stage reads instead of other data that held some of the same documents, under another
    path."""
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
    """Everything in which a segment differs from the one before it; `present`: the piece of the last step. Raises as
    `differences`."""
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


def _difference(key: str, old: Any, new: Any) -> Difference:
    kind, reason = sort(key)
    return Difference(key, old, new, kind, reason)


def _without_stages(experiment: Experiment, other: Experiment) -> dict[str, Any]:
    fields = experiment.model_dump(mode="json")
    del fields["stages"]
    fields["model"] = _spelled_out(experiment.model, other.model)
    return {section: _whole_lists(content) for section, content in fields.items()}


def _whole_lists(content: Any) -> Any:
    """Lists as one value each, since an element has no meaning of its own."""
    if isinstance(content, dict):
        return {key: _whole_lists(value) for key, value in content.items()}
    return tuple(content) if isinstance(content, list) else content


def _spelled_out(model: ModelConfig, other: ModelConfig) -> dict[str, Any]:
    """Settings of a model; those that are null in one of the two only, as what null stands for."""
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
    if name == "balance_group_sequences":  # what decides the order of the data
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
