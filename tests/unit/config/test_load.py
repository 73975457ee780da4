"""From YAML to an experiment: merging, overrides, and the text of each refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.derived import rope_base
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import dump_resolved, load_experiment, load_model

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs/dev/demo_cpu.yaml"
LARGE = ROOT / "configs/model/hunyuan_large.yaml"

EXPERIMENT = """\
base: model.yaml
name: small
run_dir: out
tokenizer: tok
optimizer:
  lr: 1e-4
stages:
  - name: only
    tokens: 7e6
    sequence_length: 512
    global_batch_sequences: 4
    lr_end: 1.0
    data: [{path: d}]
"""
MODEL = """\
model:
  num_layers: 2
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 128
  num_moe_experts: 4
  moe_routing_group_tokens: 256
  padded_vocab_size: 512
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "run.yaml").write_text(EXPERIMENT)
    return tmp_path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


def test_numbers_without_a_dot_are_numbers(folder: Path) -> None:
    experiment = load_experiment(folder / "run.yaml", ["optimizer.adam_eps=1e-9", "stages.0.tokens=7e12"])
    assert experiment.optimizer.lr == 1e-4
    assert experiment.optimizer.adam_eps == 1e-9
    assert experiment.stages[0].tokens == 7 * 10**12
    assert load_experiment(folder / "run.yaml").stages[0].num_steps == 3418  # ceil(7e6 / 2048)


def test_overrides_beat_the_file_and_the_file_beats_its_base(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT + "model: {num_layers: 4}\n")
    assert load_experiment(path).model.num_layers == 4
    assert load_experiment(path).model.hidden_size == 64
    assert load_experiment(path, ["model.num_layers=6"]).model.num_layers == 6
    assert (
        load_experiment(path, ["parallel.world_size=4", "parallel.expert_model_parallel_size=4"]).parallel.world_size
        == 4
    )


def test_later_bases_win_and_lists_are_replaced(folder: Path) -> None:
    (folder / "more.yaml").write_text(
        "model: {num_layers: 8}\nstages: [{name: a}, {name: b}]\noptimizer: {clip_grad: 0.5}\n"
    )
    (folder / "run.yaml").write_text(EXPERIMENT.replace("base: model.yaml", "base: [model.yaml, more.yaml]"))
    experiment = load_experiment(folder / "run.yaml")
    assert experiment.model.num_layers == 8
    assert [stage.name for stage in experiment.stages] == ["only"]
    assert (experiment.optimizer.lr, experiment.optimizer.clip_grad) == (1e-4, 0.5)


STAGES = """\
stages:
  - {name: warmup, tokens: 1M, sequence_length: 512, global_batch_sequences: 4, lr_end: 1.0, data: [{path: d}]}
  - {name: decay, tokens: 2M, sequence_length: 512, global_batch_sequences: 4, lr_end: 0.1, data: [{path: d}]}
"""


def test_a_mapping_changes_named_sections_of_the_list_of_a_base(folder: Path) -> None:
    (folder / "stages.yaml").write_text(STAGES)
    path = folder / "run.yaml"
    head = EXPERIMENT.partition("stages:")[0].replace("base: model.yaml", "base: [model.yaml, stages.yaml]")
    path.write_text(head + "stages:\n  decay:\n    tokens: 8M\n    data: [{path: other}]\n")
    experiment = load_experiment(path, ["stages.warmup.lr_end=0.5"])
    assert [stage.tokens for stage in experiment.stages] == [10**6, 8 * 10**6]
    assert [stage.data[0].path for stage in experiment.stages] == ["d", "other"]
    assert [stage.lr_end for stage in experiment.stages] == [0.5, 0.1]
    path.write_text(head + "stages:\n  warmup: {lr_end: 2}\n  decay:\n    tokens: soon\n    sequence_length: 500\n")
    text = refusal(path)
    assert "stages.1.tokens=soon: must be a valid integer" in text
    assert f"[{path}:10]" in text, "the line of the change"
    (folder / "child.yaml").write_text("base: run.yaml\nstages: {decay: {tokens: 3M}}\n")
    assert "stages.1.sequence_length=500: not a multiple" in (text := refusal(folder / "child.yaml"))
    assert "stages.0.lr_end=2: a fraction of optimizer.lr" in text
    assert f"[{path}:11]" in text


def test_changes_of_a_section_that_no_base_has_are_refused(folder: Path) -> None:
    (folder / "stages.yaml").write_text(EXPERIMENT)
    path = folder / "run.yaml"
    path.write_text("base: stages.yaml\nstages:\n  onyl: {tokens: 3M}\n")
    rule = "the base has none of this name (it has only; a list would replace them all)"
    assert f"stages.onyl: {rule} [{path}:3]" in refusal(path)
    path.write_text("base: stages.yaml\nstages:\n  only: 3M\n")
    assert "stages.only: must hold `key: value` lines" in refusal(path)
    path.write_text(EXPERIMENT.partition("stages:")[0] + "stages:\n  only: {tokens: 3M}\n")
    hint = "must be a list (a mapping changes a list that a base has, and no base has this one)"
    assert hint in refusal(path)


def test_bases_have_bases_relative_to_the_file_that_names_them(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "child.yaml").write_text("base: ../run.yaml\nseed: 5\n")
    (folder / "grandchild.yaml").write_text("base: deep/child.yaml\nmodel: {num_layers: 4}\n")
    experiment = load_experiment(folder / "grandchild.yaml")
    assert (experiment.name, experiment.seed, experiment.model.num_layers) == ("small", 5, 4)
    (folder / "run.yaml").write_text(EXPERIMENT.replace("  lr: 1e-4", "  lr: fast"))
    assert (
        f"optimizer.lr=fast: must be a valid number (typical: 1e-4 to 1e-3) [{folder}/deep/../run.yaml:6]"
        in refusal(folder / "grandchild.yaml")
    )
    (folder / "run.yaml").write_text("a: [1\nb: 2\n")
    assert f"[{folder}/deep/../run.yaml:2]" in refusal(folder / "grandchild.yaml")
    (folder / "run.yaml").write_text("base: nowhere.yaml\n")
    words = refusal(folder / "grandchild.yaml")
    assert words.startswith(f"{folder}/deep/../run.yaml: 1 problem\n  base=nowhere.yaml: ")
    assert words.endswith(f"[{folder}/deep/../run.yaml:1]")


def test_a_cycle_of_bases_is_printed(folder: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (folder / f"{name}.yaml").write_text(f"# {name}\nbase: {base}.yaml\n")
    circle = " -> ".join(f"{folder}/{name}.yaml" for name in "bcb")
    assert refusal(folder / "a.yaml") == (
        f"{folder}/c.yaml: 1 problem\n  base=b.yaml: is circular: {circle} (remove one of them) [{folder}/c.yaml:2]"
    )
    (folder / "a.yaml").write_text("base: a.yaml\n")
    assert f"is circular: {folder}/a.yaml -> {folder}/a.yaml" in refusal(folder / "a.yaml")


def test_a_missing_base_names_the_nearest_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(EXPERIMENT.replace("base: model.yaml", "base: modl.yaml"))
    text = refusal(folder / "run.yaml")
    assert "base=modl.yaml" in text
    assert f"did you mean {folder / 'model.yaml'}?) [{folder / 'run.yaml'}:1]" in text


@pytest.mark.parametrize("base", ["3", "[]", "[1]", "{a: b}"])
def test_a_base_that_is_not_a_path_is_refused(folder: Path, base: str) -> None:
    (folder / "run.yaml").write_text(EXPERIMENT.replace("base: model.yaml", f"base: {base}"))
    assert "must be a path or a list of paths, relative to this file" in refusal(folder / "run.yaml")


def test_an_unknown_key_names_line_and_nearest_key(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT.replace("  lr: 1e-4", "  lr: 1e-4\n  weigth_decay: 0.1"))
    expected = (
        f"{path}: 1 problem\n  optimizer.weigth_decay=0.1: unknown key (did you mean optimizer.weight_decay?) "
        f"[{path}:7]"
    )
    assert refusal(path) == expected


def test_a_key_in_the_wrong_section_names_the_right_one(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT + "num_layers: 4\n")
    assert f"num_layers=4: unknown key (did you mean model.num_layers?) [{path}:14]" in refusal(path)


def test_an_unknown_key_without_a_near_match_lists_the_known_ones(folder: Path) -> None:
    known = "data, sets, every_steps, max_sequences, micro_batch_sequences, tasks, tasks_every_steps, tasks_data"
    assert f"unknown key (known here: {known}, tasks_limit)" in refusal(folder / "run.yaml", "evaluation.qqq=1")


def test_an_unknown_override_names_the_nearest_key(folder: Path) -> None:
    text = refusal(folder / "run.yaml", "optimzer.lr=1", "parallel.expert_parallel_size=2")
    assert "optimzer={\"lr\": 1}: unknown key (did you mean optimizer?) [override 'optimzer.lr=1']" in text
    assert (
        "unknown key (did you mean parallel.expert_model_parallel_size?) [override 'parallel.expert_parallel_size=2']"
        in text
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "lr: is not an override (write dotted.path=value, such as optimizer.lr=3e-4)"),
        ("=3", "is not an override"),
        ("model..a=3", "is not an override"),
        ("stages.1.tokens=5", "stages is a list of 1, '1' is not in it (use 0, or only)"),
        ("stages.first.tokens=5", "stages is a list of 1, 'first' is not in it (use 0, or only)"),
        ("name.x=5", "name is small, not a section"),
        ("model=[1", "model=[1: is not valid YAML"),
        ("model={a: 1, a: 2}", "a: written twice"),
    ],
)
def test_a_malformed_override_is_refused(folder: Path, override: str, expected: str) -> None:
    assert expected in refusal(folder / "run.yaml", override)


def test_wrong_types_are_all_reported_with_their_lines(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT.replace("name: small", "name: 12") + "precision: {dtype: bf61}\nparallel:\nseed: true\n")
    text = refusal(
        path,
        "model.num_layers=2.5",
        'model.hidden_size="64"',
        'optimizer.lr="1e-3"',
        "model.ffn_hidden_size=64.0",
        "stages.0.tokens=-1",
        "runtime.deterministic=1",
    )
    assert text.startswith(f"{path}: 10 problems\n")
    for line in (
        f'name=12: must be a valid string (quote it: "12") [{path}:2]',
        f"precision.dtype=bf61: must be bf16 or fp32 (did you mean bf16?) [{path}:14]",
        f"parallel=null: must be a section of `key: value` lines [{path}:15]",
        f"seed=true: must be a valid integer [{path}:16]",
        "model.num_layers=2.5: must be a valid integer (typical: 64) [override 'model.num_layers=2.5']",
        'model.hidden_size="64": must be a valid integer (without quotes)',
        'optimizer.lr="1e-3": must be a valid number (without quotes)',
        "model.ffn_hidden_size=64: must be a valid integer (write 64, without a decimal point)",
        "stages.0.tokens=-1: must be greater than 0",
        "runtime.deterministic=1: must be a valid boolean",
    ):
        assert f"  {line}" in text


def test_infinity_is_refused(folder: Path) -> None:
    assert "optimizer.lr=inf: must be a finite number" in refusal(folder / "run.yaml", "optimizer.lr=.inf")


def test_missing_keys_are_explained(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT.replace("    lr_end: 1.0\n", "").replace("name: small\n", ""))
    text = refusal(path)
    assert "  name: missing (Name of the experiment in logs)" in text
    assert (
        "stages.0.lr_end: missing (Learning rate at the end of the stage, as a fraction of optimizer.lr; "
        "typical: 1.0 after" in text
    )
    assert f"[{path}:7]" in text


def test_an_empty_list_of_stages_is_refused(folder: Path) -> None:
    assert "stages=[]: must not be empty" in refusal(folder / "run.yaml", "stages=[]")


def test_duplicate_keys_are_refused(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT + "seed: 1\nseed: 2\n")
    assert refusal(path) == f"{path}: 1 problem\n  seed: written twice; the first is on line 14 (keep one) [{path}:15]"


def test_files_that_are_not_a_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    assert refusal(path) == f"{path}: 1 problem\n  file: cannot be read: No such file or directory"
    for text, expected in (
        ("", "file: is empty"),
        ("# nothing\n", "file: is empty"),
        ("- a\n", "file: must hold `key: value` lines"),
        ("a: [1\nb: 2\n", f"file: is not valid YAML: expected ',' or ']', but got ':' [{path}:2]"),
        ("a: !python/object:os.system {}\n", "unknown key"),
        ("a: 1\n---\nb: 2\n", "file: is not valid YAML"),
        ("a: \x00\n", "file: is not valid YAML"),
        ("a: &x [*x]\n", "file: is not valid YAML: a value contains itself"),
        ("a: !strange 1\n", "file: is not valid YAML: could not determine a constructor for the tag '!strange'"),
        ("5: x\n", "5=x: unknown key (known here: name"),
        ("[a, b]: x\n", "?=x: unknown key"),
        ("name: 2024-99-99\n", "run_dir: missing"),
    ):
        path.write_text(text)
        assert expected in refusal(path), text
    path.write_bytes(b"a: \xff\n")
    assert "file: is not UTF-8 text" in refusal(path)
    (tmp_path / "experiment.yaml").write_text("a: 1\n")
    assert f"did you mean {tmp_path / 'experiment.yaml'}?" in refusal(tmp_path / "experimnt.yaml")


def test_an_architecture_file_is_not_an_experiment(folder: Path) -> None:
    assert "file: holds only an architecture (model:) (make it the `base:` of an experiment" in refusal(
        folder / "model.yaml"
    )


def test_load_model_accepts_both_kinds_of_file(folder: Path) -> None:
    assert (
        load_model(folder / "model.yaml")
        == load_experiment(folder / "run.yaml").model
        == load_model(folder / "run.yaml")
    )
    assert load_model(folder / "model.yaml", ["model.num_layers=4"]).num_layers == 4
    with pytest.raises(
        ConfigError, match=r"model.num_layers=3: CLA groups of 2 layers, 3 % 2 != 0 .use 2 or 4, or cla_share_factor 1."
    ):
        load_model(folder / "model.yaml", ["model.num_layers=3"])


def test_rules_name_the_line_of_the_value(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(EXPERIMENT.replace("lr_end: 1.0", "lr_end: 1.5"))
    assert refusal(path).endswith(
        "stages.0.lr_end=1.5: a fraction of optimizer.lr, which is the peak (use 1.0, or raise optimizer.lr) "
        f"[{path}:12]"
    )


def test_a_dumped_experiment_loads_back_equal(folder: Path) -> None:
    for source in (folder / "run.yaml", DEMO):
        experiment = load_experiment(source)
        (folder / "resolved.yaml").write_text(dump_resolved(experiment))
        assert load_experiment(folder / "resolved.yaml") == experiment


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(min_value=1e-300, max_value=1e300, allow_nan=False),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    seed=st.integers(min_value=0, max_value=2**63),
)
def test_any_value_survives_a_dump(folder: Path, lr: float, name: str, seed: int) -> None:
    overrides = [f"optimizer.lr={lr!r}", f"seed={seed}", f"name={json.dumps(name)}"]
    experiment = load_experiment(folder / "run.yaml", overrides)
    assert (experiment.optimizer.lr, experiment.seed) == (lr, seed)
    (folder / "resolved.yaml").write_text(dump_resolved(experiment), encoding="utf-8")
    assert load_experiment(folder / "resolved.yaml") == experiment


def test_rope_base_of_256k() -> None:
    assert rope_base(1e4, 1e5, 80) == pytest.approx(1.34e9, rel=3e-3)
    assert rope_base(1e4, 1.0, 80) == 1e4
    with pytest.raises(ValueError, match="needs at least 4 channels"):
        rope_base(1e4, 1e5, 2)


def test_loading_a_config_imports_nothing_slow() -> None:
    """tests/benchmarks/config_import.py measures how long it takes."""
    slow = {"torch", "megatron", "numpy", "transformers", "rich", "typer"}
    code = "import sys, hunyuan_pretrain.config.load; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hunyuan_pretrain.config.load" in loaded
    assert not slow & set(loaded)
