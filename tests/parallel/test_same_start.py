"""Every node reads its own copy of the configuration, the data and the tokenizer; ranks that would train something
different do not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields


def starts(fields: dict[str, Any]) -> list[str]:
    """Refusals of: the same start, the same start at another path, and starts that differ in one thing on rank 1."""
    import torch.distributed as dist

    from hunyuan_pretrain.config.errors import ConfigError
    from hunyuan_pretrain.config.history import SourceFacts
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.parallel.groups import initialize_distributed
    from hunyuan_pretrain.train.resume import refuse_other_starts

    initialize_distributed("gloo", 60)
    same = Experiment.model_validate(fields)
    moved, other_rate = (
        Experiment.model_validate(fields | {"tokenizer": "/elsewhere", "run_dir": "/elsewhere"}),
        Experiment.model_validate(fields | {"optimizer": {"lr": 0.5}}),
    )
    refused = []
    for experiment, data, tokenizer in (
        (same, "a", "t"),
        (moved, "a", "t"),
        (other_rate, "a", "t"),
        (same, "b", "t"),
        (same, "a", "u"),
    ):
        if dist.get_rank() == 0:
            experiment, data, tokenizer = same, "a", "t"
        met = {
            "sources": {"x": SourceFacts(digest=data, sequences=1, tokens=1, sequence_length=64)},
            "tokenizer_digest": tokenizer,
        }
        try:
            refuse_other_starts(experiment, met)
            refused.append("")
        except ConfigError as error:
            refused.append(str(error))
    return refused


def test_ranks_with_different_settings_data_or_tokenizers_do_not_start(tmp_path: Path) -> None:
    ranks = fork_ranks(2, starts, experiment_fields(tmp_path, tmp_path / "run"))
    assert ranks[0] == ranks[1]
    assert ranks[0][:2] == ["", ""]
    for text, name in zip(ranks[0][2:], ("settings", "data", "tokenizer"), strict=True):
        assert f"{name}: not the same on all ranks: differs from rank 0 on 1" in text
        assert "give every node the same files and the same command" in text
