"""Stages given in epochs: tokens and weights derived from the packed data, and what prevents that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hunyuan_pretrain.cli.program import main
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import dump_resolved, load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.mixture import Mixture, SourceSize
from hunyuan_pretrain.data.sample_order import SampleOrder

SFT = Path(__file__).parents[3] / "configs/dev/sft_cpu.yaml"
LENGTH, BATCH = 512, 4

Load = Callable[..., Experiment]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the dev experiment with a stage of these settings, over data of these sequences and tokens."""

    def loaded(sizes: dict[str, tuple[int, int]], overrides: tuple[str, ...] = (), **stage: Any) -> Experiment:
        for name, (sequences, tokens) in sizes.items():
            manifest = {"format": "hunyuan-packed", "sequences": sequences, "tokens": tokens, "sequence_length": LENGTH}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        data = [{"path": str(tmp_path / name)} for name in sizes]
        fields = {"base": str(SFT), "stages": {"sft": {"tokens": None, "data": data} | stage}}
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        return load_experiment(tmp_path / "experiment.yaml", overrides)

    return loaded


def test_epochs_are_the_tokens_of_so_many_passes(load: Load) -> None:
    derived, given = load({"a": (26, 12000)}, epochs=3), load({"a": (26, 12000)}, tokens=3 * 26 * LENGTH)
    assert derived == given  # everything that a run depends on, so its numbers are the same
    assert (derived.stages[0].epochs, derived.stages[0].num_steps) == (None, -(-3 * 26 // BATCH))
    assert load({"a": (100, 12000)}, epochs=0.07).stages[0].tokens == 7 * LENGTH, "7.000000000000001 in binary"
    assert load({"a": (100, 12000)}, epochs=0.001).stages[0].tokens == LENGTH


def test_what_is_resolved_needs_no_data(load: Load, tmp_path: Path) -> None:
    experiment = load({"a": (26, 12000), "b": (7, 3500)}, epochs=3)
    for folder in ("a", "b"):
        (tmp_path / folder / "manifest.json").unlink()
    (tmp_path / "resolved.yaml").write_text(dump_resolved(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "resolved.yaml") == experiment


def test_several_sources_are_each_read_that_often(load: Load) -> None:
    sizes = {"a": (26, 12000), "b": (7, 3500), "c": (400, 1000)}  # the last is mostly padding
    (stage,) = load(sizes, epochs=2).stages
    assert [source.weight for source in stage.data] == [12000, 3500, 1000]
    of_path = {source.path: SourceSize(*size) for source, size in zip(stage.data, sizes.values(), strict=True)}
    mixture = Mixture([stage], of_path, seed=1)
    more = stage.num_steps * BATCH - 2 * 433  # of the last step
    read = {Path(mixture.sources[source]).name: count for source, count in mixture.counts[0].items()}
    assert sum(read.values()) == 2 * 433 + more
    assert all(2 * sizes[name][0] <= count <= 2 * sizes[name][0] + more for name, count in read.items())
    order = object.__new__(SampleOrder)
    order.mixture = mixture
    again = [line for line in order.passes() if "once more" in line]
    assert sum(int(line.split(", and ")[1].split()[0]) for line in again) == more == 2
    assert all(" sequences, each read 2 times" in line for line in order.passes())


@pytest.mark.parametrize(
    ("stage", "override", "expected"),
    [
        ({"epochs": 3, "tokens": 4096}, (), "stages.0.epochs=3: is the length of the stage, and so is tokens=4096"),
        ({}, (), "stages.0: has no length (give tokens, or epochs)"),
        ({"epochs": 0}, (), "stages.0.epochs=0: must be greater than 0"),
        ({"epochs": 3, "sequence_length": 1024}, (), "is packed to sequences of 512 tokens, and"),
        ({"epochs": 3}, ("stages.sft.data.1.weight=2",), "stages.0.data.1.weight=2: with epochs, every source is read"),
        ({"epochs": 3, "tier_weights": {"high": 1}}, (), "stages.0.tier_weights={'high': 1.0}: with epochs, every"),
        ({"epochs": 3, "data": [{"path": "/nowhere"}]}, (), "/nowhere/manifest.json cannot be read: No such file"),
    ],
)
def test_what_has_no_length_is_refused(
    load: Load, stage: dict[str, Any], override: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load({"a": (26, 12000), "b": (7, 3500)}, override, **stage)
    assert expected.replace("'", '"') in str(refused.value)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].where


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "hunyuan-packed", "sequences": true}', "\x00"],
    ids=["empty", "a list", "an object", "no numbers", "no text"],
)
def test_a_damaged_manifest_is_named(load: Load, tmp_path: Path, text: str) -> None:
    load({"a": (26, 12000)}, epochs=3)
    (tmp_path / "a/manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a/manifest.json is not what `hunyuan-data pack` writes \(pack it"):
        load_experiment(tmp_path / "experiment.yaml")


def test_a_plan_counts_epochs_and_says_what_it_lacks(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load({"a": (26, 12000)}, epochs=3)
    file = str(tmp_path / "experiment.yaml")

    def plan(*overrides: str) -> tuple[int, Any]:
        monkeypatch.setattr("sys.argv", ["hunyuan-pretrain", "plan", file, "--json", *overrides])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        rows = {(row["group"], row["name"]): row["value"] for row in json.loads(out)["rows"]} if out else err
        return int(ended.value.code or 0), rows

    status, rows = plan()
    assert (status, rows["stage sft", "steps"]) == (0, "20")
    (tmp_path / "a/manifest.json").unlink()
    status, said = plan()
    assert status == 2
    assert "(pack it; without it, as for a plan: epochs: null, and tokens: 1B or what it will be)" in said
    status, rows = plan("stages.sft.epochs=null", "stages.sft.tokens=40960")
    assert (status, rows["stage sft", "steps"]) == (0, "20")
