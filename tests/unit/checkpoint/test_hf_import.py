"""`import`: every form of folder that is understood gives back the same weights, and everything else is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, modeling_hunyuan, save_load
from hunyuan_pretrain.checkpoint.export_run import export_run
from hunyuan_pretrain.checkpoint.folders import checkpoint_of, verify_files
from hunyuan_pretrain.checkpoint.foreign_tensors import ForeignTensors
from hunyuan_pretrain.checkpoint.generate import MODEL_CODE, load_model, sha256_of
from hunyuan_pretrain.checkpoint.hf_import import import_model
from hunyuan_pretrain.checkpoint.loaders import NATIVE_SINCE, Format
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from hunyuan_pretrain.checkpoint.weight_map import to_megatron, weight_map
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import Tokenizer, write_hf_tokenizer
from tests.helpers.foreign import (
    ROUTER,
    as_release_fuses,
    as_transformers_fuses,
    hf_tensors,
    to_fp8,
    write_folder,
)
from tests.helpers.ranks import fork_ranks
from tests.helpers.tiny import build
from tests.helpers.tiny_export import ALPHA, tiny_model
from tests.reference.plain_hunyuan import plain_logits

MODEL = tiny_model()
NATIVE = tiny_model(cla_share_factor=1, moe_router_topk=2, share_embeddings_and_output_weights=False)
FP8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def imported_tensors(output: Path, model: ModelConfig, dtype: str) -> dict[str, Tensor]:
    """The checkpoint of an import, read as training reads it, on one rank."""
    whole = build(model, dtype=dtype)
    save_load.load(checkpoint_of(output), [whole], None)
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


def expect(output: Path, model: ModelConfig, dtype: str, wanted: dict[str, Tensor]) -> None:
    """Compare an import with Hugging Face tensors, bit by bit."""
    loaded = imported_tensors(output, model, dtype)
    expected = dict(to_megatron(model, wanted))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = tensor if name.endswith("router.weight") else tensor.to(loaded[name].dtype)
        assert torch.equal(loaded[name].view(kept.shape), kept), name


FORMS: dict[str, tuple[ModelConfig, Callable[[ModelConfig, dict[str, Tensor]], dict[str, Tensor]], dict[str, Any]]] = {
    "as the release": (MODEL, lambda _, tensors: tensors, {}),
    "the release's fused layers": (MODEL, as_release_fuses, {}),
    "in shards": (MODEL, lambda _, tensors: tensors, {"max_shard_bytes": 9000}),
    "hunyuan_v1_moe, an expert each": (NATIVE, lambda _, tensors: tensors, {"format": "hunyuan_v1_moe"}),
    "hunyuan_v1_moe, fused experts": (NATIVE, as_transformers_fuses, {"format": "hunyuan_v1_moe"}),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(form: str, dtype: str, tmp_path: Path) -> None:
    model, change, options = FORMS[form]
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tensors = hf_tensors(model, stored)
    folder = write_folder(tmp_path / "hf", model, change(model, tensors), dtype=stored, **options)
    done = import_model(folder, tmp_path / "out")
    assert done.dtype == ("bf16" if dtype == "bf16" else "fp32")
    assert done.parameters == sum(tensor.numel() for tensor in tensors.values())
    expect(tmp_path / "out", model, done.dtype, {name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_weights_are_multiplied_by_their_scales_in_fp32_and_rounded_once(
    per_row: bool, fused: bool, tmp_path: Path
) -> None:
    tensors = hf_tensors(MODEL, torch.bfloat16)
    stored, values = to_fp8(as_release_fuses(MODEL, tensors) if fused else tensors, per_row)
    if fused:  # the fused values, taken apart by the reader that the test above compares
        write_folder(tmp_path / "values", MODEL, values, dtype=torch.float32)
        import_model(tmp_path / "values", tmp_path / "expected", dtype="fp32")
        expected = imported_tensors(tmp_path / "expected", MODEL, "fp32")
    else:
        expected = dict(to_megatron(MODEL, values))
    folder = write_folder(tmp_path / "hf", MODEL, stored, quantization_config=FP8_CONFIG)
    done = import_model(folder, tmp_path / "out")
    assert done.dtype == "bf16"
    assert any("input_scale" in note for note in done.notes)
    loaded = imported_tensors(tmp_path / "out", MODEL, "bf16")
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].view(tensor.shape), tensor.to(loaded[name].dtype)), name


@pytest.mark.parametrize("format", ["hunyuan", "hunyuan_v1_moe"])
def test_what_transformers_saves_again_is_read(format: Format, tmp_path: Path) -> None:
    """Its own config.json and tensors: what a fine-tuned model is saved as."""
    if format == "hunyuan_v1_moe" and tuple(map(int, transformers.__version__.split(".")[:2])) < NATIVE_SINCE:
        pytest.skip("this transformers computes another model")
    model = MODEL if format == "hunyuan" else NATIVE
    tensors = hf_tensors(model)
    folder = write_folder(tmp_path / "hf", model, tensors, format=format)
    if format == "hunyuan":
        for name in MODEL_CODE:
            shutil.copyfile(Path(modeling_hunyuan.__file__).with_name(name), folder / name)
    loaded = load_model(folder)
    loaded.save_pretrained(tmp_path / "saved")
    shutil.copyfile(folder / "hy.tiktoken", tmp_path / "saved" / "hy.tiktoken")
    import_model(tmp_path / "saved", tmp_path / "out")
    expect(tmp_path / "out", model, "fp32", tensors)
    experiment = load_experiment(tmp_path / "out" / "experiment.yaml")
    expected = MODEL.model_copy(update={"kv_channels": 8}) if format == "hunyuan" else None
    assert expected is None or experiment.model == expected
    tokens = torch.randint(0, 460, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = loaded(tokens, use_cache=False).logits[0]
    alpha = experiment.stages[0].rope_alpha
    ours = plain_logits(experiment.model, tensors, tokens[0], torch.tensor([0, 20]), alpha)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)  # both in fp32, in another order of sums


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_of_an_import_equals_the_original(dtype: str, tmp_path: Path) -> None:
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tensors = hf_tensors(MODEL, stored)
    folder = write_folder(tmp_path / "hf", MODEL, tensors, dtype=stored)
    import_model(folder, tmp_path / "out")
    (certificate,) = fork_ranks(1, export_run, tmp_path / "out", tmp_path / "again")
    assert certificate["rope_alpha"] == ALPHA
    again = StoredTensors(tmp_path / "again")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert {name: value for name, value in after.items() if name not in ids} == before


def test_the_checkpoint_is_verified_like_any_other_and_names_its_source(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    import_model(folder, tmp_path / "out")
    checkpoint = checkpoint_of(tmp_path / "out")
    marker = save_load.read_marker(checkpoint)
    verify_files(checkpoint, marker, marker["files"])
    assert {path.name for path in checkpoint.iterdir()} == marker["files"].keys() | {"complete.json"}
    assert marker["source"]["folder"] == str(folder)
    assert marker["source"]["sha256"].keys() == {"config.json", "hy.tiktoken"}
    damaged = next(path for path in checkpoint.glob("*.distcp"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        imported_tensors(tmp_path / "out", MODEL, "fp32")


def test_the_experiment_continues_from_the_import(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf$1", MODEL, hf_tensors(MODEL))
    import_model(folder, tmp_path / "out$1")
    experiment = load_experiment(tmp_path / "out$1" / "experiment.yaml")
    assert experiment.checkpoint.init_from == str(tmp_path / "out$1")
    assert experiment.model.model_dump() == MODEL.model_dump() | {"kv_channels": MODEL.head_dim}
    assert experiment.stages[0].rope_alpha == ALPHA
    assert Tokenizer.load(experiment.tokenizer).vocab_size == 466
    assert load_experiment(tmp_path / "out$1" / "resolved.yaml").stages[0].sequence_length == 4096


# --- config.json ------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, model: ModelConfig = MODEL, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    """(model section, notes) of an import with other fields in config.json."""
    folder = write_folder(tmp_path / "hf", model, hf_tensors(model), **fields)
    done = import_model(folder, tmp_path / "out")
    return yaml.safe_load((tmp_path / "out" / "experiment.yaml").read_text())["model"], done.notes


def test_lists_with_a_value_for_each_layer_are_read_if_the_values_are_equal(tmp_path: Path) -> None:
    model, _ = read(tmp_path, moe_topk=[1, 1], num_shared_expert=[1, 1], moe_intermediate_size=[24, 24])
    assert (model["moe_router_topk"], model["ffn_hidden_size"], model["moe_ffn_hidden_size"]) == (1, 24, None)


def test_several_shared_experts_are_one_of_their_total_width(tmp_path: Path) -> None:
    wide = tiny_model(ffn_hidden_size=48, moe_ffn_hidden_size=24)
    model, _ = read(tmp_path, wide, intermediate_size=24, moe_intermediate_size=None, num_shared_expert=2)
    assert (model["ffn_hidden_size"], model["moe_ffn_hidden_size"]) == (48, 24)


def test_what_config_json_says_of_capacity_is_carried_over(tmp_path: Path) -> None:
    dropless, notes = read(tmp_path, moe_random_routing_dropped_token=False, moe_drop_tokens=False)
    assert (dropless["moe_expert_capacity_factor"], dropless["recycle_routing"]) == (None, False)
    assert any("recycle_routing: true" in note for note in notes)
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "out")
    fields = {"moe_random_routing_dropped_token": False, "moe_drop_tokens": True, "capacity_factor": 1.5}
    dropping, _ = read(tmp_path, **fields)
    assert (dropping["moe_expert_capacity_factor"], dropping["recycle_routing"]) == (1.5, False)


def test_fields_of_a_release_are_read_or_listed(tmp_path: Path) -> None:
    """Those of config.json of Hunyuan-A13B and of newer transformers."""
    scaling = {"alpha": ALPHA, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"}
    _, notes = read(
        tmp_path,
        head_dim=None,
        rope_scaling=scaling,
        bos_token_id=1,
        attention_dropout=0.1,
        mlp_bias=False,
        use_mla=False,
        norm_topk_prob=True,
        num_media_embeds=257,
        mask_init_id=12,
        moe_layer_num_skipped=0,
    )
    assert len(notes) == 3
    assert any("bos_token_id=1 of config.json" in note and "258" not in note.split("pad")[0][:10] for note in notes)
    assert any(note.startswith("attention_dropout=0.1") for note in notes)
    assert any("num_media_embeds=257" in note and "mask_init_id" not in note for note in notes)


def test_rope_parameters_of_newer_transformers_are_read(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "alpha": 7.0, "factor": 1.0, "rope_theta": 5e4}
    model, _ = read(tmp_path, rope_scaling=None, rope_theta=None, rope_parameters=rope)
    assert model["rotary_base"] == 5e4
    assert load_experiment(tmp_path / "out" / "experiment.yaml").stages[0].rope_alpha == 7.0


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (MODEL, {"model_type": "llama"}, "model_type 'llama' is not a model of this project"),
        (MODEL, {"attention_bias": True}, "attention_bias=True: this project computes it only as False"),
        (MODEL, {"hidden_act": "gelu"}, "hidden_act='gelu': this project computes it only as 'silu'"),
        (MODEL, {"norm_type": "torch_nn"}, "norm_type='torch_nn': this project computes it only as 'rms'"),
        (MODEL, {"position_embedding_xdrope": True}, "position_embedding_xdrope=True"),
        (MODEL, {"moe_topk": [1, 2]}, r"moe_topk=\[1, 2\]: a different value for each layer"),
        (MODEL, {"hidden_size": None}, "hidden_size: missing"),
        (MODEL, {"num_hidden_layers": "2"}, "num_hidden_layers='2': must be a positive integer"),
        (MODEL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*only null or"),
        (MODEL, {"rope_scaling": {"type": "dynamic", "alpha": 2.0, "new": 1}}, "rope_scaling=.*only null or"),
        (MODEL, {"num_experts": 10**9}, "num_hidden_layers x num_experts = 2,000,000,000: more than"),
        (MODEL, {"rms_norm_eps": -1.0}, "model.layernorm_epsilon=-1.0"),
        (MODEL, {"num_key_value_heads": 3}, "model.num_query_groups=3: 4 heads"),
        (NATIVE, {"format": "hunyuan_v1_moe", "moe_topk": 1}, "moe_topk=1: transformers' hunyuan_v1_moe renormalises"),
    ],
)
def test_a_config_that_means_another_model_is_refused(
    model: ModelConfig, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "hf", model, hf_tensors(model), **fields)
    refused(folder, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq', format None; only FP8 is read"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format 'pack-quantized'; only FP8"),
        (FP8_CONFIG | {"config_groups": [1]}, "quantization_config is not as any known program writes it"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "scales of blocks are not read"),
        (
            FP8_CONFIG | {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}}},
            "config_groups.a: weights of 8 bits, type 'float', strategy 'block'",
        ),
    ],
)
def test_other_quantisation_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL), quantization_config=config)
    refused(folder, tmp_path / "out", message)


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(folder: Path, output: Path, message: str, kind: type[Exception] = CheckpointError) -> None:
    """import_model says `message` and leaves nothing, not even a hidden folder."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind, match=message):
        import_model(folder, output)
    assert sorted(output.parent.iterdir()) == before


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            "model.layers.0.self_attn.q_proj.bias: not a tensor of this model",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            r"model.norm.weight: shape \(31,\), but config.json gives \(32,\)",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).int()}), "model.norm.weight: torch.int32, which"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}),
            "o_proj.weight is torch.float8_e4m3fn, and there is no weight_scale for it",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(
    change: Change, message: str, tmp_path: Path
) -> None:
    tensors = hf_tensors(MODEL)
    change(tensors)
    refused(write_folder(tmp_path / "hf", MODEL, tensors), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2), r"weight_scale is torch.float32 \(2,\); one scale for the tensor or one for each of its"),
        (torch.zeros(1), "a scale is zero, negative or not finite"),
        (torch.tensor(float("inf")), "a scale is zero, negative or not finite"),
    ],
)
def test_wrong_scales_are_refused(scale: Tensor, message: str, tmp_path: Path) -> None:
    stored, _ = to_fp8(hf_tensors(MODEL), per_row=False)
    stored["model.layers.0.self_attn.o_proj.weight_scale"] = scale
    refused(write_folder(tmp_path / "hf", MODEL, stored), tmp_path / "out", message)


def test_a_copy_of_the_tied_embedding_and_computed_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    tensors = hf_tensors(MODEL)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    folder = write_folder(tmp_path / "hf", MODEL, tensors | extra)
    notes = import_model(folder, tmp_path / "out").notes
    assert any(note.startswith("lm_head.weight, a copy of") for note in notes)
    assert any("rotary_emb.inv_freq" in note for note in notes)
    expect(tmp_path / "out", MODEL, "fp32", tensors)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL), max_shard_bytes=9000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 5)
    refused(folder, tmp_path / "out", f"{shard.name}: has .* bytes, its header describes .*; the file was cut")


def test_a_shard_that_its_certificate_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    shard, certificate = folder / "model.safetensors", folder / "certificate.json"
    certificate.write_text(json.dumps({"sha256": {shard.name: sha256_of(shard), "config.json": "0"}}))
    import_model(folder, tmp_path / "out")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(folder, tmp_path / "new", "model.safetensors: its sha256 is not the one in certificate.json")
    certificate.write_text("{}")
    refused(folder, tmp_path / "new", "certificate.json: damaged")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL), max_shard_bytes=9000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, tmp_path / "out", f"{shard.name}, which the index names, is missing")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    small = tiny_model(padded_vocab_size=400)
    folder = write_folder(tmp_path / "hf", small, hf_tensors(small))
    refused(folder, tmp_path / "out", "its tokenizer has 466 tokens, its embedding only 400 rows")
    (folder / "hy.tiktoken").unlink()
    refused(folder, tmp_path / "out", "no tokenizer: neither hy.tiktoken nor tokenizer.json", DataFormatError)


def test_an_existing_or_nested_output_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(folder, tmp_path / "out", "exists and is not an empty folder")
    refused(folder, folder / "out", "lies in .*hf, which is only read")
    refused(tmp_path / "none", tmp_path / "new", "no such folder")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(folder, tmp_path / "out", "the weights take .* GB, and only 1e-06 GB are free")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for file_bytes in (100, 50_000):  # a longer file fails, as on a full disk: the tokenizer, the embedding
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))
            refused(folder, tmp_path / "out", "out: cannot be written: .*large.*; nothing was left behind")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))

    def interrupted(self: ForeignTensors, name: str) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ForeignTensors, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_model(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_each_expert_is_stored_alone(tmp_path: Path) -> None:
    import_model(write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL)), tmp_path / "out")
    files = list(checkpoint_of(tmp_path / "out").glob("*.distcp"))
    rows = weight_map(MODEL)
    experts = sum(len(row.megatron_shape) == 3 for row in rows)
    assert len(files) == len(rows) + experts * (MODEL.num_moe_experts - 1)


def test_no_run_resumes_from_an_import(tmp_path: Path) -> None:
    from hunyuan_pretrain.train.resume import go_on

    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    import_model(folder, tmp_path / "out")
    checkpoint = checkpoint_of(tmp_path / "out")
    experiment = load_experiment(tmp_path / "out" / "experiment.yaml")
    with pytest.raises(CheckpointError, match=f"checkpoint.init_from={tmp_path / 'out'}, with another run_dir"):
        go_on(experiment, {}, checkpoint, save_load.read_marker(checkpoint))


def test_memory_holds_one_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors that were read, those of one expert or one other parameter are alive, and one that torch's writer
    has not let go."""
    import weakref

    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    alive: dict[int, int] = {}
    largest = 0
    rows = StoredTensors.rows

    def counted(self: StoredTensors, name: str, begin: int, end: int) -> Tensor:
        nonlocal largest
        tensor = rows(self, name, begin, end)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), alive.pop, id(tensor), None)
        largest = max(largest, sum(alive.values()))
        return tensor

    monkeypatch.setattr(StoredTensors, "rows", counted)
    import_model(folder, tmp_path / "out")
    embedding = 4 * MODEL.padded_vocab_size * MODEL.hidden_size
    norm = 4 * MODEL.hidden_size
    assert embedding <= largest <= embedding + norm


def test_a_router_in_another_format_becomes_fp32(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in hf_tensors(MODEL, torch.bfloat16).items()}
    folder = write_folder(tmp_path / "hf", MODEL, tensors, dtype=torch.bfloat16)
    import_model(folder, tmp_path / "out")
    loaded = imported_tensors(tmp_path / "out", MODEL, "bf16")
    router = loaded["decoder.layers.0.mlp.router.weight"]
    assert router.dtype == torch.float32
    assert torch.equal(router, tensors[f"model.layers.0{ROUTER}"].float())


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    original = Tokenizer.load(folder)
    write_hf_tokenizer(original, folder)
    (folder / "hy.tiktoken").unlink()
    import_model(folder, tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").digest == original.digest
