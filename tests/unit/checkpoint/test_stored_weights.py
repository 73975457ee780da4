"""Weights of a training checkpoint, read without the job that wrote it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError, hf_export, parallel_read
from hunyuan_pretrain.checkpoint.folders import read_marker
from hunyuan_pretrain.checkpoint.stored import INDEX, Section
from hunyuan_pretrain.checkpoint.stored_weights import verified_weights
from hunyuan_pretrain.checkpoint.tensor_files import ShardWriter, StoredTensors
from hunyuan_pretrain.checkpoint.weight_map import to_hf
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from tests.helpers import tiny
from tests.helpers.gpt_on_cpu import save_by_core
from tests.helpers.random_checkpoint import STEP, weights_of, write_random_run
from tests.helpers.ranks import fork_ranks

LAYOUTS = (
    ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2),
    ParallelConfig(expert_model_parallel_size=2, expert_tensor_parallel_size=2),
    ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
)


def save_under_every_layout(model: ModelConfig, folder: Path) -> None:
    """On each of four ranks: the same first weights, saved under each layout."""
    import torch.distributed as dist

    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed, leave_layout

    initialize_distributed("gloo", 60)
    for number, parallel in enumerate(LAYOUTS):
        groups = build_groups(parallel, 60)
        config = transformer_config(model, parallel, PrecisionConfig(dtype="fp32"), device="cpu")
        target = folder / str(number)
        target.mkdir(exist_ok=True)
        dist.barrier()
        state = {"parameters": {}}
        for chunk in build_model(config, groups, seed=1):
            state["parameters"].update(chunk.sharded_state_dict())
        save_by_core(state, target)
        leave_layout()


def test_a_checkpoint_of_any_layout_has_the_weights_of_one_rank(tmp_path: Path) -> None:
    """Tensor, pipeline, expert and expert-tensor parallel: bitwise."""
    model = tiny.tiny_model()
    fork_ranks(4, save_under_every_layout, model, tmp_path)
    expected = {name: p.detach() for name, p in tiny.build(model, seed=1).named_parameters()}
    for number, layout in enumerate(LAYOUTS):
        weights = weights_of(tmp_path / str(number))
        assert weights.keys() == expected.keys(), layout
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items()), layout
        name = "decoder.layers.1.mlp.experts.linear_fc1.weight"
        assert torch.equal(weights.rows(name, 1, 3), expected[name][1:3]), layout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two files; tests must not write to it."""
    return write_random_run(tmp_path_factory.mktemp("random") / "run", {"num_layers": 2})


@pytest.fixture
def checkpoint(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    name = f"step_{STEP:07d}"
    return Path(shutil.copytree(run_dir / "checkpoints" / name, tmp_path / "checkpoints" / name))


def test_one_expert_is_read_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, name = weights_of(checkpoint), "decoder.layers.0.mlp.experts.linear_fc2.weight"
    whole = weights[name]
    read: list[int] = []
    read_bytes = parallel_read.read_bytes

    def counted(descriptor: int, section: Section, buffer: memoryview) -> None:
        read.append(len(buffer))
        read_bytes(descriptor, section, buffer)

    monkeypatch.setattr(parallel_read, "read_bytes", counted)
    assert torch.equal(weights.rows(name, 2, 3), whole[2:3])
    assert read == [whole[2].nbytes]


def test_other_processes_can_read_it(checkpoint: Path) -> None:
    weights = weights_of(checkpoint)
    again = pickle.loads(pickle.dumps(weights))
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "metadata", "not listed"])
def test_a_file_that_is_not_as_written_is_refused(damage: str, checkpoint: Path) -> None:
    path = checkpoint / (INDEX if damage == "metadata" else "__1_0.distcp")
    marker = read_marker(checkpoint)
    if damage in ("bit", "metadata"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 100)
    elif damage == "missing":
        path.unlink()
    else:
        del marker["files"]["__1_0.distcp"]
    expected = (
        "of __1_0.distcp, which is not in complete.json"
        if damage == "not listed"
        else f"{path.name} is missing or damaged"
    )
    with pytest.raises(CheckpointError, match=expected):
        verified_weights(checkpoint, marker, processes=1)


def test_a_file_that_ends_early_is_refused_also_without_digests(checkpoint: Path) -> None:
    weights = weights_of(checkpoint)
    for path in checkpoint.glob("*.distcp"):
        os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights["decoder.final_layernorm.weight"]


def test_metadata_that_is_no_metadata_is_refused(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"\.metadata: not a"):
        weights_of(checkpoint)


def written(run_dir: Path, output: Path, processes: int) -> dict[str, bytes]:
    model = ModelConfig.model_validate(read_marker(run_dir / f"checkpoints/step_{STEP:07d}")["model"])
    weights = weights_of(run_dir / f"checkpoints/step_{STEP:07d}")
    output.mkdir()
    writer = ShardWriter(output, hf_export._stored(model, torch.bfloat16), max_shard_bytes=40_000)
    hf_export._write_weights(model, weights, writer, processes, None)
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_an_export_has_the_same_bytes_whatever_the_number_of_processes(run_dir: Path, tmp_path: Path) -> None:
    alone = written(run_dir, tmp_path / "one", 1)
    assert len(alone) > 3
    assert written(run_dir, tmp_path / "three", 3) == alone
    weights = weights_of(run_dir / f"checkpoints/step_{STEP:07d}")
    model = ModelConfig.model_validate(read_marker(run_dir / f"checkpoints/step_{STEP:07d}")["model"])
    stored = StoredTensors(tmp_path / "three")
    for name, tensor in to_hf(model, weights):
        assert torch.equal(stored[name], tensor.to(stored[name].dtype)), name
    assert json.loads(alone["model.safetensors.index.json"])["weight_map"].keys() == stored.keys()
