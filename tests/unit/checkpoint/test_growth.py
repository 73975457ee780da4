"""What a save and a load cost beside the tensors, in worlds that only data parallelism enlarges."""

from __future__ import annotations

from typing import Any

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks

WORLDS = (16, 64, 256)
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 40,
    "num_moe_experts": 4,
    "padded_vocab_size": 256,
    "moe_routing_group_tokens": 32,
}
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
}


def rows() -> list[dict[str, Any]]:
    """One row for each world; in the middle of each, every rank finds what it reads, or an error is raised."""
    from tests.helpers.checkpoint_growth import measure

    stage = {"name": "s", "tokens": 200_000, "sequence_length": 128, "global_batch_sequences": 256, "lr_end": 1.0}
    fields: dict[str, Any] = {
        "name": "growth",
        "run_dir": "none",
        "tokenizer": "none",
        "model": MODEL,
        "parallel": LAYOUT,
        "precision": {"dtype": "bf16"},
        "optimizer": {"lr": 1e-3},
        "stages": [stage | {"data": [{"path": "none"}]}],
    }
    experiment = Experiment.model_validate(fields)
    return [measure(experiment, world_size) for world_size in WORLDS]


def test_nothing_but_the_number_of_files_grows_with_data_parallelism() -> None:
    """Each tensor is written once and found by every rank that reads it, whatever the world; a rank writes and reads
    less, and the index and the marker grow by as much as a rank's generators and files need."""
    small, middle, large = fork_ranks(1, rows)[0]
    for before, after in ((small, middle), (middle, large)):
        ranks = after["ranks"] - before["ranks"]
        assert after["records"] - before["records"] == ranks, "the generators of each rank"
        assert 0 < after["index bytes"] - before["index bytes"] <= 150 * ranks
        assert 0 < after["complete.json bytes"] - before["complete.json bytes"] <= 300 * ranks
        assert after["files"] <= 2 * after["ranks"] + 3
        assert after["most records of a rank"] < before["most records of a rank"]
        assert after["most regions of a rank"] < before["most regions of a rank"]
        assert after["most files a rank reads tensors from"] <= before["most files a rank reads tensors from"]
