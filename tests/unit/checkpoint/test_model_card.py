"""README.md of an export says what was recorded, and that the rest is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import read_marker
from hunyuan_pretrain.checkpoint.history import refuse_another_vocabulary
from hunyuan_pretrain.checkpoint.model_card import CardFacts, StageFacts, facts_of_run, share_of
from hunyuan_pretrain.config.schema import DataSource, StageConfig
from hunyuan_pretrain.data.tokenizer import Tokenizer, format_ranks
from tests.helpers.runs import experiment_fields, run_forked, write_experiment
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

STAGE = StageFacts("anneal", 4096, 8_192_000, (("code", 0.7, 5_000_000), ("web", 0.3, None)))


def card(tmp_path: Path, facts: CardFacts | None, **options: Any) -> str:
    export_tiny(tiny_model(), write_tiny_tokenizer(tmp_path), tmp_path / "out", card=facts, **options)
    return (tmp_path / "out" / "README.md").read_text()


def test_a_card_states_model_data_figures_certificate_loaders_and_licence(tmp_path: Path) -> None:
    facts = CardFacts("tiny one", 500, (STAGE,), (("held-out loss", 400, 2.34567),), "apache-2.0")
    text = card(tmp_path, facts)
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    for line in (
        "# tiny one",
        "| of them active for a token |",
        "| layers that share one set of keys and values (CLA) | 2 |",
        "| experts: shared, routed, routed ones of a token | 1, 4, 1 |",
        "8,192,000 tokens in 500 steps.",
        "| anneal | 8,192,000 | 4,096 | code | 70.0% | 5,000,000 |",
        "| anneal | 8,192,000 | 4,096 | web | 30.0% | unknown |",
        "| held-out loss | 400 | 2.3457 |",
        "| max abs difference |",
        'dtype="auto", trust_remote_code=True)',
        "cla_share_factor=2",
        "## Licence\n\napache-2.0",
    ):
        assert line in text, line


def test_a_card_counts_the_parameters_of_the_weights(tmp_path: Path) -> None:
    from safetensors import safe_open

    text = card(tmp_path, None)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)
    assert f"| parameters | {total:,} |" in text


def test_what_is_not_recorded_is_said_to_be_unknown(tmp_path: Path) -> None:
    text = card(tmp_path, None)
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    for line in ("## Training data\n\nNot recorded.", "No loss is recorded.", "## Licence\n\nUnknown"):
        assert line in text


def test_shares_follow_weights_and_tiers() -> None:
    sources = [("a", 2.0, "high"), ("b", 1.0, "high"), ("c", 5.0, "low")]
    fields: dict[str, Any] = {"name": "x", "tokens": 1, "sequence_length": 1, "global_batch_sequences": 1, "lr_end": 1}
    data = tuple(DataSource(path=path, weight=weight, tier=tier) for path, weight, tier in sources)
    plain = StageConfig(**fields, data=data)
    assert [share_of(source, plain) for source in data] == [0.25, 0.125, 0.625]
    tiered = StageConfig(**fields, data=data, tier_weights={"high": 3, "low": 1})
    assert [share_of(source, tiered) for source in data] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("licence", ["Apache 2.0", "", "mit\nx: y"])
def test_a_licence_that_is_no_identifier_is_refused(licence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be an identifier as Hugging Face lists them"):
        facts_of_run(tmp_path, tmp_path, licence)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of three steps, validated after the second."""
    folder = tmp_path_factory.mktemp("card")
    fields = experiment_fields(corpus, folder / "run", steps=3)
    status, _, err = run_forked("train", write_experiment(folder / "x.yaml", fields))
    assert status == 0, err
    return folder / "run"


def checkpoint_of(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def test_facts_are_those_of_the_run(trained: Path) -> None:
    folder = checkpoint_of(trained)
    facts = facts_of_run(trained, folder)
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    with_loss = [record for record in records if "loss" in record]
    assert facts.step == read_marker(folder)["step"] == 3
    assert sum(stage.tokens for stage in facts.stages) == with_loss[-1]["cumulative_tokens"]
    assert ("training loss of the step", with_loss[-1]["step"], with_loss[-1]["loss"]) in facts.losses
    assert all(tokens for stage in facts.stages for _, _, tokens in stage.sources)
    assert sum(share for _, share, _ in facts.stages[0].sources) == pytest.approx(1)


def test_losses_after_the_checkpoint_and_damaged_lines_do_not_count(trained: Path, tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": 5.0, "validation/code/loss": 4.0},
        {"step": 3, "loss": 4.5, "validation_loss": 4.25, "validation_bits_per_byte": 1.5},
        {"step": 4, "loss": 1.0, "validation_loss": 1.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert set(facts_of_run(tmp_path, checkpoint_of(trained)).losses) == {
        ("training loss of the step", 3, 4.5),
        ("held-out loss, code", 2, 4.0),
        ("held-out loss", 3, 4.25),
        ("held-out, bits per byte", 3, 1.5),
    }


def test_another_vocabulary_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = checkpoint_of(trained)
    refuse_another_vocabulary(folder, trained / "tokenizer")
    ranks = dict(Tokenizer.load(trained / "tokenizer").ranks)
    first, second = list(ranks)[300:302]
    ranks[first], ranks[second] = ranks[second], ranks[first]
    (tmp_path / "hy.tiktoken").write_bytes(format_ranks(ranks))
    with pytest.raises(CheckpointError, match=r"its vocabulary is not the one that .* was trained with"):
        refuse_another_vocabulary(folder, tmp_path)
