"""A value means what it looks like: token counts, paths, YAML words, merged sections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import all_paths, dump_resolved, field_at, load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import number_hint, section_of, token_count, with_absolute_paths
from tests.unit.config.test_load import EXPERIMENT, MODEL


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "run.yaml").write_text(EXPERIMENT)
    return tmp_path / "run.yaml"


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(config, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("10B", 10**10),
        ("1.5T", 1_500_000_000_000),
        ("4k", 4000),
        ("4K", 4000),
        ("300M", 300_000_000),
        ("4Ki", 4096),
        ("1Mi", 1 << 20),
        ("1_000k", 10**6),
        ("0.1B", 10**8),
        (".5k", 500),
        ("1e3k", 10**6),
        ("1.0001k", 1000.1),
        *((text, None) for text in ("10 B", "10b", "10G", "B", "10", "k4", "1.5", "10BB", "", "4kb", "1e", "eB", "-")),
    ],
)
def test_a_count_of_tokens_with_a_suffix(text: str, count: float | None) -> None:
    assert token_count(text) == count
    assert type(token_count(text)) is type(count)


def test_tokens_are_counted_with_suffixes_in_files_and_overrides(config: Path) -> None:
    assert load_experiment(config, ["stages.0.tokens=10B"]).stages[0].tokens == 10**10
    noise = ["optimizer.expert_lr_ratio=null", "optimizer.expert_lr_noise_scale_tokens=1.5M"]
    assert load_experiment(config, noise).optimizer.expert_lr_noise_scale_tokens == 1.5e6
    config.write_text(
        EXPERIMENT.replace("tokens: 7e6", "tokens: 300M").replace("sequence_length: 512", "sequence_length: 1Ki")
    )
    stage = load_experiment(config).stages[0]
    assert (stage.tokens, stage.sequence_length) == (300_000_000, 1024)


def test_a_number_that_may_be_a_word_has_one_message(config: Path) -> None:
    for text, rule in (
        ("mesured", "must be a valid number or measured"),
        ("-1", "must be greater than 0 or measured"),
        ("true", "must be a valid number or measured"),
    ):
        message = refusal(config, f"optimizer.expert_lr_noise_scale_tokens={text}")
        assert message.count("expert_lr_noise_scale_tokens") == 2, "the setting, and the override"
        assert f"  optimizer.expert_lr_noise_scale_tokens={text}: {rule}" in message


def test_an_invalid_number_gets_the_right_hint(config: Path) -> None:
    suffixes = "10B, 1.5T, 300M and 4k are 1e10, 1.5e12, 3e8 and 4000; 4Ki is 4096"
    rule = "must be a valid integer"
    for text, hint in (
        ("10 B", f"write 10B: {suffixes}"),
        ("10b", f"write 10B: {suffixes}"),
        ("10 billion", f"write 10B: {suffixes}"),
        ("2t", f"write 2T: {suffixes}"),
        ("a few", suffixes),
        ("010", "write 10; a leading zero means octal to some readers of YAML"),
        ("1,000,000", "write 1_000_000"),
        ("1:30", "a number without colons"),
    ):
        assert f"stages.0.tokens={text}: {rule} ({hint})".replace("=010", '="010"') in refusal(
            config, f"stages.0.tokens={text}"
        ), text
    text = refusal(
        config, "model.num_layers=1k", "runtime.deterministic=yes", "optimizer.lr=010", "stages.0.tokens=1.0001k"
    )
    assert f"model.num_layers=1k: {rule} (write 1000; suffixes are for counts of tokens)" in text
    assert "runtime.deterministic=yes: must be a valid boolean (write true)" in text
    assert 'optimizer.lr="010": must be a valid number (write 10; a leading zero' in text
    assert f"stages.0.tokens=1000.1: {rule}" in text
    assert number_hint("4 KiB", True) == f"write 4Ki: {suffixes}"


def test_words_follow_yaml_1_2(config: Path) -> None:
    for word in (
        "no",
        "yes",
        "on",
        "off",
        "y",
        "N",
        "010",
        "1:30",
        "12:30:45",
        "2024-01-01",
        "2024-1-1",
        "0b11",
        "=",
        "1e",
        "1.5.2",
    ):
        config.write_text(EXPERIMENT.replace("name: small", f"name: {word}"))
        experiment = load_experiment(config)
        assert experiment.name == word
        assert load_experiment(config, [f"name={word}"]).name == word
        (config.parent / "again.yaml").write_text(dump_resolved(experiment))
        assert load_experiment(config.parent / "again.yaml") == experiment
    assert load_experiment(config, ["stages.0.balance_attention=off"]).stages[0].balance_attention == "off"
    numbers = {"1e9": 10**9, "1E+3": 1000, "0x10": 16, "0o17": 15, "1_000": 1000, "+5": 5}
    for text, number in numbers.items():
        assert load_experiment(config, [f"seed={text}"]).seed == number
    for text, value in {"1e-4": 1e-4, ".5": 0.5, "5.": 5.0, "1.5e-3": 1.5e-3, "3": 3.0, "1_0.5": 10.5}.items():
        assert load_experiment(config, [f"optimizer.lr={text}"]).optimizer.lr == value


@pytest.mark.parametrize(
    "name", ["1e9", "1_000", "true", "null", "~", "no", "0o17", "<<", "12", "1.5", ".inf", "a #b", "# a", "", " x"]
)
def test_a_text_that_looks_like_something_else_survives_the_resolved_file(config: Path, name: str) -> None:
    experiment = load_experiment(config).model_copy(update={"name": name})
    (config.parent / "again.yaml").write_text(dump_resolved(experiment))
    assert load_experiment(config.parent / "again.yaml").name == name


def test_no_part_of_an_override_is_taken_for_a_comment(config: Path) -> None:
    assert load_experiment(config, ["run_dir=runs/a #3"]).run_dir == "runs/a #3"
    assert load_experiment(config, ["name=#3"]).name == "#3"
    assert load_experiment(config, ["name= a#3 # b "]).name == "a#3 # b"
    assert load_experiment(config, ['name="a" ']).name == "a"
    assert load_experiment(config, ["stages.0.data=[{path: 'a #1'}, {path: b}]"]).stages[0].data[0].path == "a #1"
    for text in ('"a" # b', "[{path: a}] # b"):
        assert f"stages.0.data={text}: is not valid YAML: something follows the value (quote the value)" in refusal(
            config, f"stages.0.data={text}"
        )


def test_sections_are_merged(config: Path) -> None:
    """A section's own keys win, then those of the first of several merged sections; nothing is nested deeper than the
    YAML says; positions are those of the source text."""
    config.write_text(
        EXPERIMENT.replace("  - name: only", "  - &first\n    name: only")
        + "  - <<: *first\n    name: second\n    lr_end: 0.5\n  - {<<: [{lr_shape: linear, name: x}, *first], "
        "name: third}\n"
    )
    only, second, third = load_experiment(config).stages
    assert (second.name, second.lr_end, second.tokens, second.data) == ("second", 0.5, only.tokens, only.data)
    assert (third.name, third.lr_shape, second.lr_shape) == ("third", "linear", "cosine")
    config.write_text(config.read_text().replace("    lr_end: 1.0", "    lr_end: high"))
    assert (
        f"stages.2.lr_end=high: must be a valid number (typical: 1.0 after warmup, 0.1 after anneal) [{config}:"
        in refusal(config)
    )
    for text, expected in (
        ("<<: 5", "<<: merges a section, or a list of sections (such as <<: *name of a section marked &name)"),
        ("<<: [1]", "<<: merges a section, or a list of sections"),
        (
            "<<: {seed: 1}\n<<: {seed: 2}",
            "<<: written twice; the first is on line 14 (give it a list: <<: [*first, *second])",
        ),
        ("seed: 1\nseed: 2", "seed: written twice; the first is on line 14 (keep one)"),
        ("parallel: &p {<<: *p}", "a value contains itself"),
        ("<<: *nobody", "is not valid YAML: found undefined alias 'nobody'"),
    ):
        config.write_text(EXPERIMENT + text + "\n")
        assert expected in refusal(config), text


def test_a_tab_is_named(config: Path) -> None:
    config.write_text(EXPERIMENT.replace("  lr: 1e-4", "\tlr: 1e-4"))
    assert (
        refusal(config) == f"{config}: 1 problem\n  file: is not valid YAML: a tab where YAML wants spaces [{config}:6]"
    )


def test_paths_are_expanded(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS_9", "/big/corpus")
    config.write_text(
        EXPERIMENT.replace("run_dir: out", "run_dir: ~/x")
        .replace("tokenizer: tok", "tokenizer: ${CORPUS_9}/tok")
        .replace("{path: d}", "{path: $CORPUS_9/d}")
        + "evaluation: {data: ~}\ncheckpoint: {init_from: ~/base}\n"
    )
    experiment = load_experiment(config, ["evaluation.data=$CORPUS_9/held"])
    assert experiment.run_dir == "/home/me/x"
    assert experiment.tokenizer == "/big/corpus/tok"
    assert experiment.stages[0].data[0].path == "/big/corpus/d"
    assert (experiment.evaluation.data, experiment.checkpoint.init_from) == ("/big/corpus/held", "/home/me/base")
    dollars = load_experiment(config, ["run_dir=a$$b/$", "tokenizer=$${HOME}"])
    assert (dollars.run_dir, dollars.tokenizer) == ("a$b/$", "${HOME}")
    (config.parent / "again.yaml").write_text(dump_resolved(dollars))
    assert load_experiment(config.parent / "again.yaml") == dollars
    assert load_experiment(config, ["name=$CORPUS_9 ~"]).name == "$CORPUS_9 ~", "no path"
    (config.parent / "child.yaml").write_text("base: $CORPUS_9/run.yaml\n")
    monkeypatch.setenv("CORPUS_9", str(config.parent))
    assert load_experiment(config.parent / "child.yaml").name == "small"


def test_a_path_with_an_undefined_variable_or_user_names_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    text = refusal(
        config,
        "run_dir=$NOWHERE/x",
        "tokenizer=~nobody_of_this_name/x",
        "stages.0.data.0.path=",
        "evaluation.data=''",
        "seed=x",
    )
    assert text.startswith(f"{config}: 5 problems\n")
    for line in (
        "run_dir=$NOWHERE/x: the environment has no variable NOWHERE (set it, or write $$ for a dollar) "
        "[override 'run_dir=$NOWHERE/x']",
        "tokenizer=~nobody_of_this_name/x: there is no user nobody_of_this_name, whose home ~nobody_of_this_name "
        "would be",
        "stages.0.data.0.path=null: must be a valid string",
        'evaluation.data="": is empty, and would be the working directory (write . for that)',
    ):
        assert f"  {line}" in text
    (config.parent / "child.yaml").write_text("base: ${NOWHERE}/run.yaml\n")
    assert "base=${NOWHERE}/run.yaml: the environment has no variable NOWHERE" in refusal(config.parent / "child.yaml")


def test_a_run_records_absolute_paths(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded in one folder is the same from another."""
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("run.yaml", ["evaluation.data=held", "checkpoint.init_from=/base"])
    made = with_absolute_paths(experiment)
    assert (made.run_dir, made.tokenizer) == (f"{tmp_path}/out", f"{tmp_path}/tok")
    assert (made.stages[0].data[0].path, made.evaluation.data) == (f"{tmp_path}/d", f"{tmp_path}/held")
    assert made.checkpoint.init_from == "/base"
    changed = {"run_dir", "tokenizer", "stages", "evaluation", "checkpoint"}
    assert made.model_dump(exclude=changed) == experiment.model_dump(exclude=changed)
    (tmp_path / "resolved.yaml").write_text(dump_resolved(made))
    os.chdir("/")
    assert with_absolute_paths(load_experiment(tmp_path / "resolved.yaml")) == made


def test_every_path_in_the_schema_is_marked() -> None:
    """So that a new setting that is a path is expanded and made absolute like the others."""
    for path in all_paths(Experiment):
        name = path.rpartition(".")[2]
        field = field_at(Experiment, tuple(path.split(".")))
        extra = field.json_schema_extra or {}
        is_text = section_of(field.annotation) is None and (
            field.annotation is str or str in get_args(field.annotation)
        )
        is_path = name in ("tokenizer", "data", "path", "init_from", "resume_from", "adapter") or name.endswith(
            ("_dir", "_path", "_file", "_folder", "_data")
        )
        assert bool(extra.get("is_path")) == (is_text and is_path), path
