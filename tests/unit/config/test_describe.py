"""What `explain` and `config diff` say."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.describe import diff, explain
from hunyuan_pretrain.config.load import all_paths, load_experiment
from hunyuan_pretrain.config.schema import ConfigError, Experiment

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
    assert "  resilience" not in explain("")
    assert all(f"\n  {name} " in explain("") for name in Experiment.model_fields)


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
    b = load_experiment(DEMO, ["optimizer.lr=1e-3", "stages.0.data=[{path: x}, {path: y, weight: 2}]", "checkpoint.keep_last=null"])
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
