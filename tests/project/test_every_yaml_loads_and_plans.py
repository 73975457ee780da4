"""Every YAML under configs/ is an architecture or an experiment that loads, and an experiment can be planned; or it is
in base/, a part of experiments (test_recipes.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hunyuan_pretrain.config.load import load_experiment, load_model
from hunyuan_pretrain.plan.counts import parameters
from hunyuan_pretrain.plan.summary import summarise

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.y*ml") if path.parent.name != "base")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CONFIGS)) for path in FILES])
def test_every_yaml_loads_and_plans(path: Path) -> None:
    assert parameters(load_model(path)).total > 0
    if path.parent.name != "model":
        assert summarise(load_experiment(path))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CONFIGS)) for path in FILES])
def test_architecture_files_hold_only_an_architecture(path: Path) -> None:
    holds_only_model = set(yaml.safe_load(path.read_text())) - {"base"} == {"model"}
    assert holds_only_model == (path.parent.name == "model")
