"""What may change when a run resumes: the table covers every setting, and differences are classified by it."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.acceptance import check_accepted, refusal, refusal_text
from hunyuan_pretrain.config.changes import (
    TABLE,
    Difference,
    Kind,
    all_differences,
    differences,
    model_differences,
    sort,
)
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import Segment, SourceFacts, experiment_of, read_history, write_history
from hunyuan_pretrain.config.load import all_paths, load_experiment
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"


def leaves() -> list[str]:
    """Every setting; settings of a stage with the stage's number."""
    paths = list(all_paths(Experiment))
    return [
        path.replace("stages.", "stages.0.", 1)
        for path in paths
        if not any(other.startswith(f"{path}.") for other in paths)
    ]


def changed(**changes: Any) -> Experiment:
    """The demo's experiment with changed values: section__key=value, stages__N__key=value."""
    fields = load_experiment(DEMO).model_dump(mode="json")
    for path, value in changes.items():
        *outer, last = path.split("__")
        target: Any = fields
        for name in outer:
            target = target[int(name) if name.isdecimal() else name]
        target[last] = value
    return Experiment.model_validate(fields)


def found(new: Experiment, step: int = 30) -> dict[str, Difference]:
    old = load_experiment(DEMO)
    return {one.key: one for one in differences(old, new, Schedule.of(old.stages).piece_of_step(step))}


@pytest.mark.parametrize("path", leaves())
def test_every_setting_is_in_the_table(path: str) -> None:
    assert sort(path)[1] != sort("no.such.setting")[1], (
        f"{path}: say in config/changes.py what a change of it means for a run that goes on"
    )
    assert len(sort(path)[1]) > 3


def test_every_line_of_the_table_names_a_setting() -> None:
    met = (
        "tokenizer.digest",
        "stages.N.data.digest",
        "world_size",
        "versions.*",
        "attention.*",
        "stages",
        "stages.order",
        "stages.N.data",
    )
    settings = [path.replace("stages.0.", "stages.N.") for path in leaves()]
    for pattern, _, _ in TABLE:
        assert pattern in met or fnmatch.filter(settings, pattern), pattern


def test_a_change_of_an_unlisted_setting_is_refused() -> None:
    assert sort("model.new_setting")[0] == Kind.refused


def test_only_settings_that_change_shapes_or_the_meaning_of_weights_must_match() -> None:
    losses = changed(model__moe_aux_loss_coeff=0.05, model__moe_z_loss_coeff=0.1, model__moe_expert_capacity_factor=2.0)
    assert {one.kind for one in found(losses).values()} == {Kind.recorded}
    old = load_experiment(DEMO).model
    others = {
        "rotary_base": 5e5,
        "qk_layernorm": not old.qk_layernorm,
        "cla_share_factor": 1,
        "hidden_size": old.hidden_size * 2,
    }
    for key, value in others.items():
        new = changed(**{f"model__{key}": value})
        assert found(new)[f"model.{key}"].kind == Kind.never
        assert [one.key for one in model_differences(old.model_dump(), new.model)] == [f"model.{key}"]


def test_two_spellings_of_the_same_shape_do_not_differ() -> None:
    old = load_experiment(DEMO).model
    spelled_out = changed(model__kv_channels=old.head_dim, model__moe_ffn_hidden_size=old.expert_ffn_size)
    assert model_differences(old.model_dump(), spelled_out.model) == []
    assert found(spelled_out) == {}


def test_differences_are_sorted_into_harmless_recorded_and_refused() -> None:
    kinds = {
        key: one.kind
        for key, one in found(changed(name="x", seed=5, optimizer__lr=1.0, logging__log_every_steps=7)).items()
    }
    assert kinds == {
        "name": Kind.harmless,
        "seed": Kind.refused,
        "optimizer.lr": Kind.recorded,
        "logging.log_every_steps": Kind.harmless,
    }
    assert found(changed()) == {}


def test_the_format_of_the_optimizer_state_may_change_and_the_record_says_what_happens() -> None:
    average, aware = {"optimizer__ema_decay": 0.99}, {"optimizer__use_precision_aware_optimizer": True}
    differences = found(changed(**average, **aware, optimizer__exp_avg_sq_dtype="bf16"))
    assert {key: (one.kind, one.reason) for key, one in differences.items()} == {
        "optimizer.use_precision_aware_optimizer": (
            Kind.recorded,
            "how fp32 main weights are stored; they keep their values",
        ),
        "optimizer.ema_decay": (
            Kind.recorded,
            "from null it begins with the weights as they are now; with null the average so far is dropped",
        ),
        "optimizer.exp_avg_sq_dtype": (
            Kind.recorded,
            "the moments are converted when they are loaded; bf16 rounds them once",
        ),
    }


def test_a_finished_or_future_stage_is_not_the_current_one() -> None:
    first, *_, last = range(len(load_experiment(DEMO).stages))
    of_first = found(
        changed(**{f"stages__{first}__tokens": 1000}), step=Schedule.of(load_experiment(DEMO).stages).num_steps - 1
    )
    assert of_first[f"stages.{first}.tokens"].reason == "the stage is over: no effect"
    of_last = found(changed(**{f"stages__{last}__sequence_length": 1000}), step=0)
    assert of_last[f"stages.{last}.sequence_length"].kind == Kind.recorded, (
        "it can be packed to another length before it begins"
    )
    assert (
        found(changed(**{"stages__0__sequence_length": 1000}), step=0)["stages.0.sequence_length"].kind == Kind.refused
    )


def test_moving_a_stage_across_the_current_one_is_refused() -> None:
    """Otherwise the stage would be trained again, at its learning rate, or never; in either case, and even if the
    change were listed, that would be a surprise."""
    old = load_experiment(DEMO)
    fields = [stage.model_dump(mode="json") for stage in old.stages]
    fields.append({**fields[-1], "name": "last"})
    four = changed(stages=fields)

    def order(*numbers: int, step: int) -> list[tuple[str, Kind]]:
        new = changed(stages=[fields[number] for number in numbers])
        return [(one.key, one.kind) for one in differences(four, new, Schedule.of(four.stages).piece_of_step(step))]

    assert order(1, 0, 2, 3, step=30) == [("stages.order", Kind.refused)], (
        "the warmup would be trained again after the decay"
    )
    assert order(0, 2, 1, 3, step=30) == [("stages.order", Kind.refused)], "the anneal would never be trained"
    assert order(0, 1, 3, 2, step=30) == [("stages.order", Kind.recorded)]
    assert order(1, 0, 2, 3, step=Schedule.of(four.stages).num_steps - 1) == []
    assert order(1, 2, 3, step=30) == [("stages", Kind.recorded)]
    swapped = changed(stages=[fields[1], fields[0]])
    (told, _) = differences(four, swapped, Schedule.of(four.stages).piece_of_step(30))[:2]
    assert str(told).startswith(
        'stages.order: ["warmup", "decay"] -> ["decay", "warmup"] (stages that have ended would be trained again'
    )


def test_changing_the_group_size_of_an_order_by_cost_is_refused() -> None:
    """null means the batch: another batch size would give another order, and is refused if the order depends on it."""
    old = changed(stages__0__balance_attention="group")
    batch = old.stages[0].global_batch_sequences
    piece = Schedule.of(old.stages).piece_of_step(0)
    twice = changed(stages__0__balance_attention="group", stages__0__global_batch_sequences=2 * batch)
    kept = changed(
        stages__0__balance_attention="group",
        stages__0__global_batch_sequences=2 * batch,
        stages__0__balance_group_sequences=batch,
    )
    assert [one.key for one in refusal(differences(old, twice, piece), ())] == ["stages.0.balance_group_sequences"]
    assert refusal(differences(old, kept, piece), ()) == []


def test_one_message_names_every_refused_difference_and_how_to_accept_it() -> None:
    stopping = refusal(
        list(found(changed(seed=5, model__hidden_size=64, stages__0__sequence_length=128), step=0).values()), ()
    )
    lines = refusal_text("RUN", stopping).splitlines()
    assert lines[:3] == [
        "RUN: the run cannot continue with this configuration",
        "a checkpoint of another model:",
        lines[2],
    ]
    assert lines[2] == "  model.hidden_size: 256 in the checkpoint, 64 in the config: changes the shape of the weights"
    assert "  seed: 1234 in the checkpoint, 5 in the config: changes the order of the data" in "\n".join(lines)
    assert lines[-1].endswith("continue anyway with --accept-changes seed,stages.0.sequence_length")
    assert [one.key for one in refusal(stopping, ["seed", "stages.0"])] == ["model.hidden_size"], (
        "no hand can accept another model"
    )


def test_accepting_an_unknown_key_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--accept-changes=sed: not a change that needs to be accepted \(did you mean seed\?\)"
    ):
        check_accepted(["seed", "sed"])


def test_data_is_identified_by_its_content() -> None:
    def segment(path: str, digest: str, tokenizer: str = "t") -> Segment:
        experiment = changed(
            stages=[{**load_experiment(DEMO).stages[0].model_dump(mode="json"), "data": [{"path": path}]}]
        )
        facts = {path: SourceFacts(digest=digest, sequences=9, tokens=90, sequence_length=10)}
        return Segment(
            first_step=0, experiment=experiment.model_dump(mode="json"), sources=facts, tokenizer_digest=tokenizer
        )

    old = segment("a", "1")
    piece = Schedule.of(old.config.stages).piece_of_step(0)
    assert [(one.key, one.kind) for one in all_differences(old, segment("b", "1"), piece)] == [
        ("stages.0.data.path", Kind.harmless)
    ]
    assert [(one.key, one.kind) for one in all_differences(old, segment("a", "2"), piece)] == [
        ("stages.0.data.digest", Kind.refused)
    ]
    assert {(one.key, one.kind) for one in all_differences(old, segment("b", "2"), piece)} == {
        ("stages.0.data", Kind.recorded)
    }
    assert [one.key for one in all_differences(old, segment("a", "1", "u"), piece)] == ["tokenizer.digest"]


def test_documents_that_the_current_stage_has_read_do_not_return_under_another_path() -> None:
    """Data that is packed again beside the old folder has different sequences, as if it were packed again in place."""

    def segment(path: str, digest: str, corpus: str) -> Segment:
        experiment = changed(
            stages=[{**load_experiment(DEMO).stages[0].model_dump(mode="json"), "data": [{"path": path}]}]
        )
        facts = SourceFacts(
            digest=digest, sequences=9, tokens=90, sequence_length=10, documents=((corpus, "folder", 1, 9),)
        )
        return Segment(first_step=0, experiment=experiment.model_dump(mode="json"), sources={path: facts})

    old = segment("a", "1", "c")
    piece = Schedule.of(old.config.stages).piece_of_step(0)
    again = all_differences(old, segment("b", "2", "c"), piece)
    assert ("stages.0.data.digest", Kind.refused) in [(one.key, one.kind) for one in again]
    assert refusal(again, ["stages.0.data"]) == []
    assert {one.kind for one in all_differences(old, segment("b", "2", "d"), piece)} == {Kind.recorded}
    assert [one.key for one in all_differences(old, segment("b", "1", "c"), piece)] == ["stages.0.data.path"]


def test_a_history_reads_back_and_ignores_settings_of_other_versions(tmp_path: Path) -> None:
    fields = load_experiment(DEMO).model_dump(mode="json")
    fields["model"]["gone_by_now"] = 3
    written = [Segment(first_step=0, experiment=fields, changes=["x"]), Segment(first_step=7, experiment=fields)]
    write_history(tmp_path, written)
    assert read_history(tmp_path) == written
    assert read_history(tmp_path)[1].config == load_experiment(DEMO)
    assert sorted(path.name for path in (tmp_path / "segments").iterdir()) == ["0001.yaml", "0002.yaml"]
    assert load_experiment(tmp_path / "segments/0002.yaml") == load_experiment(DEMO)
    (tmp_path / "segments.json").write_text("{")
    with pytest.raises(ConfigError, match=r"segments\.json: 1 problem\n  segments: damaged: .* \(remove it"):
        read_history(tmp_path)
    with pytest.raises(ConfigError, match="recorded by another version"):
        experiment_of({"name": "x"}, "here")
