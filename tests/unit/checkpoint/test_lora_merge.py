"""`merge-lora`: W + scaling * B @ A in fp32, rounded once, as PEFT merges; each tensor of the adapter has its place, or
the adapter is refused."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import load_model, sha256_of
from hunyuan_pretrain.checkpoint.lora_merge import BASE_RECORD, merge_lora
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from hunyuan_pretrain.config.schema import ModelConfig
from tests.helpers.foreign import ROUTER, as_transformers_fuses, hf_tensors, write_folder, write_tensors
from tests.helpers.tiny_export import tiny_model

MODEL = tiny_model()
UNTIED = tiny_model(cla_share_factor=1, moe_router_topk=2, share_embeddings_and_output_weights=False)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PREFIX = "base_model.model."
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def low_rank(module: str, rows: int, columns: int, rank: int, seed: int = 1) -> dict[str, Tensor]:
    """The two tensors of one module, as PEFT names them."""
    return {
        f"{PREFIX}{module}.lora_A.weight": noise(rank, columns, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": noise(rows, rank, seed=seed + 1),
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """An adapter folder; rank 4 and alpha 8 unless `fields` say otherwise. A field that is None is left out."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    write_tensors(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


def write_base(folder: Path, model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    return write_folder(folder, model, hf_tensors(model, dtype), dtype=dtype, **fields)


# --- what is added ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_the_sum_is_computed_in_fp32_and_rounded_once(stored: str, dtype: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=DTYPES[stored], max_shard_bytes=9000)
    added = (
        low_rank(Q0, 32, 32, 4)
        | low_rank(EXPERT, 32, 24, 4, seed=3)
        | low_rank("model.layers.0.mlp.gate.wg", 4, 32, 4, 5)
    )
    done = merge_lora(base, write_adapter(tmp_path / "adapter", added), tmp_path / "out", dtype=dtype)
    assert (done.changed, done.dtype) == (3, dtype)
    before, after = StoredTensors(base), StoredTensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name in before:
        wanted = before[name].float()
        a, b = (f"{PREFIX}{name.removesuffix('weight')}lora_{letter}.weight" for letter in "AB")
        if a in added:
            wanted = wanted + added[b] @ added[a] * 2.0
        wanted = wanted.to(torch.float32 if name.endswith(ROUTER) else DTYPES[dtype])
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


def test_patterns_and_rslora_set_the_scale_of_a_module(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    added = low_rank(Q0, 32, 32, 4) | low_rank(Q1, 32, 32, 2, seed=7) | low_rank(EXPERT, 32, 24, 4, seed=9)
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.3\.down_proj": 3}}
    merge_lora(base, write_adapter(tmp_path / "adapter", added, use_rslora=True, **patterns), tmp_path / "out")
    before, after = StoredTensors(base), StoredTensors(tmp_path / "out")
    for module, scale in ((Q0, 8 / math.sqrt(4)), (Q1, 8 / math.sqrt(2)), (EXPERT, 3 / math.sqrt(4))):
        a, b = (added[f"{PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
        assert torch.equal(after[f"{module}.weight"], before[f"{module}.weight"] + b @ a * scale), module


def test_saved_modules_replace_and_embeddings_are_transposed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", UNTIED)
    embedding = StoredTensors(base)["model.embed_tokens.weight"]
    a, b, head = noise(4, 480, seed=1), noise(32, 4, seed=2), noise(480, 32, seed=3)
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
        f"{PREFIX}model.embed_tokens.base_layer.weight": embedding,
        f"{PREFIX}lm_head.weight": head,
    }
    merge_lora(base, write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"]), tmp_path / "out")
    after = StoredTensors(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], embedding + (b @ a).T * 2.0)
    assert torch.equal(after["lm_head.weight"], head)
    tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = embedding + 1
    other = write_adapter(tmp_path / "other", tensors, modules_to_save=["lm_head"])
    refused(base, other, tmp_path / "new", "of another base: its copy of model.embed_tokens.weight differs")


@pytest.mark.parametrize("is_stored_fused", [False, True])
def test_adapters_of_fused_experts_are_taken_apart(is_stored_fused: bool, tmp_path: Path) -> None:
    """A: (experts * rank, in), the expert slowest. B: (out, rank * experts), the expert fastest. gate_up_proj lies
    inside down_proj's wrapper."""
    tensors = hf_tensors(UNTIED)
    change = as_transformers_fuses if is_stored_fused else lambda _, unchanged: unchanged
    base = write_folder(tmp_path / "base", UNTIED, change(UNTIED, tensors), format="hunyuan_v1_moe")
    experts = "model.layers.0.mlp.experts"
    added = low_rank(f"{experts}.base_layer", 48, 32, 16) | low_rank(experts, 32, 24, 8, seed=5)
    fields = {"target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"]}
    fields |= {"rank_pattern": {"experts.down_proj": 2}}
    merge_lora(base, write_adapter(tmp_path / "adapter", added, **fields), tmp_path / "out")
    after = StoredTensors(tmp_path / "out")
    for expert in range(4):
        a, b = (added[f"{PREFIX}{experts}.base_layer.lora_{letter}.weight"] for letter in "AB")
        gate_up = b[:, expert::4] @ a[4 * expert : 4 * expert + 4] * 2.0
        a, b = (added[f"{PREFIX}{experts}.lora_{letter}.weight"] for letter in "AB")
        parts = (gate_up[:24], gate_up[24:], b[:, expert::4] @ a[2 * expert : 2 * expert + 2] * 4.0)
        names = [f"{experts}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        wanted = [tensors[name] + part for name, part in zip(names, parts, strict=True)]
        if is_stored_fused:
            assert torch.equal(after[f"{experts}.gate_up_proj"][expert], torch.cat(wanted[:2]))
            assert torch.equal(after[f"{experts}.down_proj"][expert], wanted[2])
        else:
            for name, tensor in zip(names, wanted, strict=True):
                assert torch.allclose(after[name], tensor, rtol=0, atol=1e-7), name  # halves are multiplied apart
    other = "model.layers.1.mlp.experts"
    kept = dict(change(UNTIED, tensors))
    assert all(torch.equal(after[name], kept[name]) for name in kept if name.startswith(other))


def test_everything_else_is_copied_except_what_is_not_true_any_more(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "release_tokenizer").mkdir()
    (base / "release_tokenizer" / "a.json").write_text("{}")
    (base / "README.md").write_text("text")
    (base / "certificate.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4))
    done = merge_lora(base, adapter, tmp_path / "out")
    assert done.left_out == ["README.md", "certificate.json"]
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {"config.json", "hy.tiktoken", "release_tokenizer/a.json", "model.safetensors", "merge.json"}
    assert found == kept
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["adapter_sha256"]["adapter_model.safetensors"] == sha256_of(adapter / "adapter_model.safetensors")


# --- against PEFT -----------------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[ModelConfig, str, str, dict[str, Any]]] = {
    "linear layers, patterns": (
        MODEL,
        "hunyuan",
        "fp32",
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj", "wg"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"self_attn.o_proj": 16},
        },
    ),
    "bf16, rslora": (MODEL, "hunyuan", "bf16", {"target_modules": ["q_proj", "k_proj", "up_proj"], "use_rslora": True}),
    "embedding, saved head": (
        UNTIED,
        "hunyuan",
        "fp32",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "fused experts": (
        UNTIED,
        "hunyuan_v1_moe",
        "fp32",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "one of the fused": (
        UNTIED,
        "hunyuan_v1_moe",
        "fp32",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_peft_bit_by_bit(case: str, tmp_path: Path) -> None:
    """In bf16 too, except for fused experts, whose product PEFT rounds to bf16 before it adds it."""
    peft = pytest.importorskip("peft", reason="peft is not installed: the formulas above are tested alone")
    model, format, dtype, fields = GOLDEN[case]
    from hunyuan_pretrain.checkpoint import generate
    from hunyuan_pretrain.checkpoint.generate import MODEL_CODE

    base = write_base(tmp_path / "base", model, DTYPES[dtype], format=format)
    if format == "hunyuan":
        for name in MODEL_CODE:
            (base / name).write_bytes(Path(generate.__file__).with_name(name).read_bytes())
    trained = peft.get_peft_model(load_model(base), peft.LoraConfig(r=4, lora_alpha=8, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter").merge_and_unload().state_dict()
    merge_lora(base, tmp_path / "adapter", tmp_path / "out")
    ours, before = load_model(tmp_path / "out").state_dict(), load_model(base).state_dict()
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert changed
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path, output: Path, message: str, dtype: str | None = None) -> None:
    """merge_lora says `message` and leaves nothing."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(CheckpointError, match=message):
        merge_lora(base, adapter, output, dtype=dtype)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True: not understood"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True: not understood"),
        ({"bias": "all"}, "bias='all': only 'none' is understood"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA': only 'LORA' is understood"),
        ({"peft_type": None}, "peft_type: missing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': only True is understood"),
        ({"some_new_option": {"a": 1}}, "some_new_option={'a': 1}: not understood"),
        ({"target_parameters": ["q_proj.weight"]}, r"target_parameters \['q_proj.weight'\]: only gate_up_proj and"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\]: a dict is expected"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': a list is expected"),
        ({"alpha_pattern": {"(": 3}}, "'\\(' is not a pattern"),
        ({"r": 0}, "r: positive numbers are expected"),
        ({"alpha_pattern": {"q_proj": "high"}}, "lora_alpha: positive numbers are expected, here and in alpha_pattern"),
    ],
)
def test_adapters_of_another_kind_are_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4), **fields)
    refused(write_base(tmp_path / "base"), adapter, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            low_rank("model.layers.7.self_attn.q_proj", 32, 32, 4),
            "the base has no model.layers.7.self_attn.q_proj.weight",
        ),
        (low_rank(Q0, 32, 33, 4), rf"shapes \(4, 33\) and \(32, 4\) with r=4 do not fit {Q0}, \(32, 32\)"),
        (low_rank(Q0, 32, 32, 3), "with r=4 do not fit"),
        ({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(4, 32)}, f"its partner {PREFIX}{Q0}.lora_B.weight is missing"),
        ({f"{PREFIX}{Q0}.lora_B.weight": torch.ones(32, 4)}, f"its partner {PREFIX}{Q0}.lora_A.weight is missing"),
        ({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(32)}, "neither lora_A, lora_B nor a module of"),
        ({"other.lora_A.weight": torch.ones(4, 32)}, "other.lora_A.weight: does not begin with base_model.model."),
        (low_rank("model.embed_tokens", 480, 32, 4), "at once embedding and output layer of the base"),
        (low_rank("lm_head", 480, 32, 4), "at once embedding and output layer of the base"),
        (low_rank("model.layers.0.mlp.experts", 48, 32, 16), "the base has no model.layers.0.mlp.experts.weight"),
        ({}, "it has no tensors"),
    ],
)
def test_every_tensor_of_the_adapter_must_have_its_place(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors)
    refused(write_base(tmp_path / "base"), adapter, tmp_path / "out", message)


def test_a_tied_embedding_is_not_replaced(tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", {f"{PREFIX}lm_head.weight": torch.ones(480, 32)}, modules_to_save=["lm_head"]
    )
    refused(write_base(tmp_path / "base"), adapter, tmp_path / "out", "lm_head.weight is at once embedding and output")


def test_a_base_other_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4))
    record = {"sha256": {"model.safetensors": sha256_of(base / "model.safetensors")}}
    (adapter / BASE_RECORD).write_text(json.dumps(record))
    merge_lora(base, adapter, tmp_path / "out")
    other = write_folder(tmp_path / "other", MODEL, hf_tensors(MODEL, seed=1))
    refused(other, adapter, tmp_path / "new", "of another base: the sha256 of model.safetensors")
    (adapter / BASE_RECORD).write_text("{}")
    refused(base, adapter, tmp_path / "new", "base.json: damaged")


def test_numbers_that_the_new_format_does_not_have_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    big = low_rank(Q0, 32, 32, 4)
    big[f"{PREFIX}{Q0}.lora_A.weight"] *= 1e7
    adapter = write_adapter(tmp_path / "adapter", big)
    refused(base, adapter, tmp_path / "out", "not finite numbers in float16; choose bf16 or fp32", "fp16")
    merge_lora(base, adapter, tmp_path / "out", dtype="bf16")
    big[f"{PREFIX}{Q0}.lora_A.weight"][0, 0] = float("nan")
    broken = write_adapter(tmp_path / "broken", big)
    refused(base, broken, tmp_path / "new", "not finite numbers in float32$")


def cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 3)


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "adapter_model.safetensors: has .* bytes, its header describes .*; the file was cut"),
        (pickled, "adapter_model.bin is a pickle, which could run code; save it as safetensors"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors is there"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "give a folder that PEFT saved"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
    ],
)
def test_a_damaged_adapter_is_refused(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4))
    damage(adapter)
    refused(write_base(tmp_path / "base"), adapter, tmp_path / "out", message)


def test_a_quantised_base_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4))
    quantised = write_base(tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    refused(quantised, adapter, tmp_path / "out", "a quantised base")
    refused(adapter, adapter, tmp_path / "out", "config.json: cannot be read: .*give a Hugging Face model folder")
    refused(tmp_path / "none", adapter, tmp_path / "out", "none: no such folder")
    refused(base, adapter, base / "out", "lies in .*base, which is only read")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(base, adapter, tmp_path / "out", "exists and is not an empty folder")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q0, 32, 32, 4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a longer file fails, as on a full disk
        refused(base, adapter, tmp_path / "out", "out: cannot be written: .*large.*; nothing was left behind")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
