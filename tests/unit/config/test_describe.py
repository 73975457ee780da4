"""What `explain` and `config diff` print."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.describe import diff, explain
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import all_paths, load_experiment
from hunyuan_pretrain.config.schema import Experiment

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"


def test_a_setting_has_meaning_type_unit_default_and_a_typical_value() -> None:
    assert explain("stages.0.lr_shape") == explain("stages.lr_shape")
    assert explain("model.kv_channels").splitlines() == [
        "model.kv_channels",
        "  meaning   Width of one head; null means hidden_size / num_attention_heads.",
        "  type      integer > 0 or null",
        "  unit      channels",
        "  default   null",
        "  typical   80",
    ]
    assert "  type      auto or cuda or cpu\n  default   auto" in explain("runtime.device")
    assert "  type      true or false" in explain("checkpoint.resume")
    assert "  type      number > 0\n  unit      1/step\n  default   none: must be given" in explain("optimizer.lr")


def test_a_section_lists_its_fields() -> None:
    lines = explain("optimizer").splitlines()
    assert lines[0] == "optimizer: a section"
    assert any(line.startswith("  clip_grad ") and line.endswith("(number >= 0, default 1)") for line in lines)
    assert explain("stages").startswith("stages: a list of sections\n  The phases of training, in order.")
    assert all(f"\n  {name} " in explain("") for name in Experiment.model_fields)


def test_without_a_key_every_setting_is_listed_under_its_section() -> None:
    """With type, unit and default, in the order of the schema; nested sections are indented."""
    lines = explain().splitlines()
    found: list[str] = []
    above: list[str] = []
    for line in lines[1 : lines.index("")]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        above = [*above[:depth], name]
        found.append(".".join(above))
    assert found == list(all_paths(Experiment))
    text = "\n".join(lines)
    assert "\n    num_layers  " in text
    assert "(integer > 0, unit layers)" in text
    assert "(integer > 0, unit tokens, default 512)" in text
    assert (
        "\n    data                     Packed datasets of the stage, mixed by weight (list of sections)\n      path "
        in text
    )
    assert "list of list" not in text
    assert "object" not in text
    assert "suffixes are allowed: 10B, 1.5T, 300M and 4k are 1e10, 1.5e12, 3e8 and 4000; 4Ki is 4096." in text


@pytest.mark.parametrize(
    ("path", "type_"),
    [
        ("stages.skip_data_steps", "list of pairs [integer > 0, integer > 0]"),
        ("stages.tier_weights", "mapping of names to numbers > 0 or null"),
        ("parallel.pipeline_layout", "list of integers > 0 or null"),
        (
            "stages.tokens",
            "integer > 0 or null, also with a suffix: "
            "10B, 1.5T, 300M and 4k are 1e10, 1.5e12, 3e8 and 4000; 4Ki is 4096",
        ),
        ("run_dir", "path; ~ and $NAME are expanded, and it is relative to the working directory"),
        ("checkpoint.init_from", "path or null; ~ and $NAME are expanded, and it is relative to the working directory"),
        ("seed", "integer >= 0 and <= 9223372036854775808"),
        ("name", "text"),
        ("precision.fp8_format", "e4m3 or hybrid or null"),
    ],
)
def test_types_are_plain_english(path: str, type_: str) -> None:
    assert f"  type      {type_}\n" in explain(path)


@pytest.mark.parametrize("path", list(all_paths(Experiment)))
def test_every_setting_is_explained(path: str) -> None:
    assert len(explain(path).splitlines()) >= 2
    assert "None" not in explain(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("optimzer.lr", "did you mean optimizer.lr?"),
        ("lr", "did you mean optimizer.lr?"),
        ("hidden_sise", "did you mean model.hidden_size?"),
        ("model.layers", "did you mean model.num_layers?"),
        ("stages.token", "did you mean stages.tokens?"),
        ("evaluation.set", "did you mean evaluation.sets?"),
        ("stages.data.weights", "did you mean stages.data.weight?"),
        (
            "tensor_parallel",
            "did you mean parallel.tensor_model_parallel_size or parallel.expert_tensor_parallel_size?",
        ),
        ("zzz", "known here: name, run_dir"),
        ("data.qqq", "did you mean stages.data or evaluation.data?"),
    ],
)
def test_an_unknown_setting_names_the_nearest(path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explain(path)
    assert f"explain: 1 problem\n  {path}: unknown setting" in str(caught.value)
    assert expected in str(caught.value)


def test_diff_names_what_differs() -> None:
    a = load_experiment(DEMO)
    b = load_experiment(
        DEMO, ["optimizer.lr=1e-3", "stages.0.data=[{path: x}, {path: y, weight: 2}]", "checkpoint.keep_last=null"]
    )
    assert diff(a, a) == []
    assert diff(a, b) == [
        "optimizer.lr: 0.002 -> 0.001",
        "stages.0.data.0.path: demo_out/packed/train -> x",
        "checkpoint.keep_last: 2 -> null",
        "stages.0.data.1.path: (absent) -> y",
        "stages.0.data.1.weight: (absent) -> 2",
        "stages.0.data.1.max_epochs: (absent) -> null",
        "stages.0.data.1.tier: (absent) -> null",
    ]
    c = load_experiment(DEMO, ["optimizer.lr=0.00200000001"])
    assert diff(a, c) == ["optimizer.lr: 0.002 -> 0.00200000001"]
