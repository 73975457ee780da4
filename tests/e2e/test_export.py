"""From a training run to folders that others load: every parameter maps once, and logits are those of the training
model."""

from tests.helpers import tiny  # noqa: I001

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hunyuan_pretrain.checkpoint.folders import checkpoint_folder, read_marker
from hunyuan_pretrain.checkpoint.stored_weights import StoredWeights
from hunyuan_pretrain.checkpoint.weight_map import weight_map
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields, run_forked, write_experiment


def trained(corpus, folder, ranks=None, **changes):
    """A run of a few steps; returns its run directory."""
    config = write_experiment(folder / "experiment.yaml", experiment_fields(corpus, folder / "run", steps=3, **changes))
    status, _, err = run_forked("train", config, ranks=ranks)
    assert status == 0, err
    return folder / "run"


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A one-rank run with every feature on; tests must not write to it."""
    return trained(corpus, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cla_share_factor": 1},
        {"share_embeddings_and_output_weights": False},
        {"qk_layernorm": False},
        {"moe_ffn_hidden_size": None},
    ],
)
def test_every_parameter_maps_to_hf_once(changes):
    """The map's left side is exactly the training model's parameters, names and shapes; its right side has no name
    twice."""
    architecture = tiny.tiny_model(**changes)
    mine = {name: tuple(parameter.shape) for name, parameter in tiny.build(architecture).named_parameters()}
    table = weight_map(architecture)
    assert {entry.megatron_name: tuple(entry.megatron_shape) for entry in table} == mine
    assert len(table) == len(mine)
    hf_names = [name for entry in table for name in entry.hf_names]
    assert len(hf_names) == len(set(hf_names))


def export_where_a_gpu_is(run_dir: str, output: str) -> dict[str, object]:
    """An export in a process that sees an unusable GPU: a tensor created without an explicit device ends up on none."""
    from hunyuan_pretrain.checkpoint.export_run import export_run

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("meta")
    return export_run(Path(run_dir), Path(output))


def test_an_export_is_made_on_the_cpu_on_any_machine(plain, tmp_path):
    (certificate,) = fork_ranks(1, export_where_a_gpu_is, str(plain), str(tmp_path / "out"))
    assert certificate["max_abs_difference"] < 1e-4


def test_export_of_a_run_equals_the_training_model_and_loads_without_this_project(corpus, tmp_path):
    """Trained by two ranks with expert parallelism and every feature on; loaded in a process that has only
    transformers."""
    run_dir = trained(corpus, tmp_path, ranks=2, parallel={"expert_model_parallel_size": 2})
    status, _, err = run_forked("export", str(run_dir), str(tmp_path / "out"), "--license", "mit")
    assert status == 0, err
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["max_abs_difference"] < 1e-4
    assert certificate["source"] == {"run": "tiny", "step": 3, "weights": "trained"}
    assert certificate["rope_alpha"] == 10.0, "the last stage's"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit\n" in card
    assert "| training loss of the step | 3 |" in card
    code = f"""
import sys
sys.modules["hunyuan_pretrain"] = sys.modules["megatron"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "out")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.tensor([AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("def f(x):")["input_ids"]])
longer = model.generate(tokens, max_new_tokens=4, do_sample=False)
print(type(model).__name__, model(tokens).logits.shape[-1], longer.shape[-1] - tokens.shape[-1])
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert loaded.stdout.split() == ["HunYuanForCausalLM", "512", "4"], loaded.stderr

    status, text, err = run_forked("generate", str(tmp_path / "out"), "--prompt", "def ", "--max-new-tokens", "8")
    assert status == 0, err
    assert text.strip()


def test_native_format_of_a_run(plain, corpus, tmp_path):
    """The format that transformers and vLLM load: refused with CLA or top-1, correct without."""
    status, _, err = run_forked("export", str(plain), str(tmp_path / "out"), "--format", "hunyuan_v1_moe")
    assert status == 2
    assert "cla_share_factor" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()

    (tmp_path / "native").mkdir()
    changes = {
        "model__cla_share_factor": 1,
        "model__moe_router_topk": 2,
        "model__moe_ffn_hidden_size": 48,
        "precision": {"dtype": "bf16"},
    }
    run_dir = trained(corpus, tmp_path / "native", **changes)
    status, _, err = run_forked(
        "export", str(run_dir), str(tmp_path / "out"), "--format", "hunyuan_v1_moe", "--dtype", "fp32"
    )
    assert status == 0, err
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["loaded_with"] == "HunYuanMoEV1ForCausalLM"
    assert certificate["max_abs_difference"] < 1e-3


def test_router_stays_fp32_in_a_bf16_export(corpus, tmp_path):
    run_dir = trained(corpus, tmp_path, precision={"dtype": "bf16"})
    status, _, err = run_forked("export", str(run_dir), str(tmp_path / "out"))
    assert status == 0, err
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes["model.layers.0.mlp.gate.wg.weight"] == torch.float32
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16


def test_the_moving_average_of_a_run_is_exported(corpus, tmp_path, plain):
    """From three checkpoints: the average of the last is numpy's of the first average and the weights after it."""
    optimizer = {"lr": 1e-2, "ema_decay": 0.75}
    run_dir = trained(corpus, tmp_path, model__num_layers=2, optimizer=optimizer, checkpoint={"save_every_steps": 1})

    def stored(step, which):
        folder = checkpoint_folder(run_dir, step)
        files = read_marker(folder)["files"]
        return StoredWeights(folder, {name: file["bytes"] for name, file in files.items()}, which)

    status, text, err = run_forked("export", str(run_dir), str(tmp_path / "out"), "--weights", "ema")
    assert status == 0, err
    assert ", step 3, moving average of the weights\n" in text
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["source"] == {"run": "tiny", "step": 3, "weights": "ema", "ema_decay": 0.75}
    assert certificate["max_abs_difference"] < 1e-4
    assert "an exponential moving average of the trained ones, decay 0.75" in (tmp_path / "out/README.md").read_text()
    weights, first = [stored(step, "trained") for step in (2, 3)], stored(1, "ema")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for entry in weight_map(tiny.tiny_model(**read_marker(checkpoint_folder(run_dir, 3))["model"])):
            expected = first[entry.megatron_name].double()
            for after in weights:
                expected = 0.75 * expected + 0.25 * after[entry.megatron_name].double()
            for name, tensor in zip(entry.hf_names, entry.to_hf(expected.float()), strict=True):
                # two updates round to fp32 a few times
                torch.testing.assert_close(file.get_tensor(name), tensor, rtol=1e-6, atol=1e-7)

    status, _, err = run_forked("export", str(plain), str(tmp_path / "none"), "--weights", "ema")
    assert status == 2
    assert "no moving average of the weights: optimizer.ema_decay was null when it was saved" in err
    assert "Traceback" not in err
    assert not (tmp_path / "none").exists()


def export_with_a_wrong_map(run_dir, output) -> str:
    """In a separate process: write the query rows of one layer rotated by one; returns the error that export raises."""
    from hunyuan_pretrain.checkpoint import CheckpointError, hf_export
    from hunyuan_pretrain.checkpoint.export_run import export_run

    right = hf_export.weight_map

    def wrong(model):
        for row in right(model):
            is_rotated = row.hf_names == ("model.layers.1.self_attn.q_proj.weight",)
            yield replace(row, to_hf=lambda tensor: (tensor.roll(1, 0),)) if is_rotated else row

    hf_export.weight_map = wrong
    try:
        export_run(run_dir, output)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_an_export_that_computes_something_else_is_refused(plain, tmp_path):
    (message,) = fork_ranks(1, export_with_a_wrong_map, plain, tmp_path / "out")
    assert "does not compute the same as the model it came from: layer 1, given the same input" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_checkpoint_is_one_message_and_leaves_nothing(damage, plain, tmp_path):
    run_dir = Path(shutil.copytree(plain, tmp_path / "run"))
    path = run_dir / "checkpoints/step_0000003/__0_1.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "bit" else content[:-1])
    status, _, err = run_forked("export", str(run_dir), str(tmp_path / "out"))
    assert status == 2
    assert "__0_1.distcp is missing or damaged: its size or sha256 is not the one in complete.json" in err
    assert "Traceback" not in err
    assert [found.name for found in tmp_path.iterdir()] == ["run"]
