"""Exports: what is written, what is verified, what is refused, and that plain transformers loads them."""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import MODEL_CODE, load_model, load_tokenizer, sha256_of
from hunyuan_pretrain.checkpoint.hf_export import export
from hunyuan_pretrain.checkpoint.loaders import NATIVE_SINCE
from hunyuan_pretrain.checkpoint.modeling_hunyuan import CACHE_NAME, HunYuanForCausalLM
from hunyuan_pretrain.checkpoint.weight_map import to_hf
from hunyuan_pretrain.data.tokenizer import Tokenizer
from tests.helpers.tiny_export import (
    ALPHA,
    PlainLayers,
    export_tiny,
    own_module_cache,
    random_tensors,
    reference_logits,
    tiny_model,
    write_tiny_tokenizer,
)

native = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < NATIVE_SINCE,
    reason="this transformers computes another model",
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "tiny"
    export_tiny(tiny_model(), tokenizer_folder, output)
    return output


def test_an_export_computes_the_same_as_the_model(exported: Path) -> None:
    certificate = json.loads((exported / "certificate.json").read_text())
    assert certificate["max_abs_difference"] < 1e-4
    assert certificate["mean_kl_nats"] < 1e-8
    assert certificate["source"] == {"run": "tiny", "step": 3}
    assert set(certificate["versions"]) >= {"python", "torch", "transformers", "safetensors", "hunyuan-pretrain"}
    assert certificate["tolerance"]["reason"]


def test_certificate_holds_the_digest_of_every_file(exported: Path) -> None:
    certificate = json.loads((exported / "certificate.json").read_text())
    files = {str(path.relative_to(exported)): path for path in exported.rglob("*") if path.is_file()}
    written_after = {"certificate.json", "README.md"}
    on_disk = {name: sha256_of(path) for name, path in files.items() if name not in written_after}
    assert certificate["sha256"] == on_disk
    assert set(on_disk) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *MODEL_CODE,
    }


def test_config_has_the_fields_and_ids_of_this_model(exported: Path, tokenizer_folder: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert config["architectures"] == ["HunYuanForCausalLM"]
    assert config["rope_scaling"] == {"type": "dynamic", "alpha": ALPHA, "factor": 1.0}
    assert (config["use_cla"], config["cla_share_factor"], config["num_experts"], config["moe_topk"]) == (True, 2, 4, 1)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        tokenizer.start_id,
        tokenizer.end_id,
        tokenizer.pad_id,
    )
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.end_id, tokenizer.eos_id]
    assert generation["suppress_tokens"] == list(range(466, 480))
    assert generation["pad_token_id"] == tokenizer.pad_id
    assert [generation[name] for name in ("do_sample", "temperature", "top_p", "top_k")] == [True, 0.7, 0.6, 20]
    assert config["transformers_version"] == generation["transformers_version"] == transformers.__version__
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 4096
    assert Tokenizer.load(exported).digest == tokenizer.digest, "hy.tiktoken, for the release's scripts"


def test_nothing_unfinished_is_left_beside_an_export(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["tiny"]


def test_a_fresh_process_with_only_transformers_loads_it(exported: Path, tmp_path: Path) -> None:
    """trust_remote_code, the folder's own code, no import of this project: equal logits, and generate() works."""
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = load_model(exported)(tokens).logits
    script = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hunyuan_pretrain", "megatron"):
            raise ImportError(name + " is not there on a user's machine")
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = torch.arange(3, 40)[None]
with torch.inference_mode():
    logits = model(tokens).logits
generated = model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=5, do_sample=False)
torch.save({"logits": logits, "generated": generated, "module": type(model).__module__}, out)
"""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(
        [sys.executable, "-c", script, str(exported), str(tmp_path / "out.pt")],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    result = torch.load(tmp_path / "out.pt")
    assert result["module"].startswith("transformers_modules")
    assert torch.equal(result["logits"], expected)
    assert 1 <= result["generated"].shape[1] - len("hello") <= 5


def test_shards_hold_every_tensor_once_and_load(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(share_embeddings_and_output_weights=False)
    export_tiny(model, tokenizer_folder, tmp_path / "sharded", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    expected = dict(to_hf(model, random_tensors(model)))
    assert len(set(index["weight_map"].values())) > 3
    assert list(index["weight_map"]) == list(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_export_keeps_the_router_fp32(
    dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path
) -> None:
    certificate = export_tiny(tiny_model(), tokenizer_folder, tmp_path / "half", dtype=dtype)
    assert 0 < certificate["median_relative_difference"] < certificate["tolerance"]["median"]
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert all(kind == (torch.float32 if name.endswith("gate.wg.weight") else dtype) for name, kind in kinds.items())


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        *((wrong, torch.float32) for wrong in ("alpha", "expert", "norm", "order")),
        ("alpha", torch.bfloat16),
        ("order", torch.bfloat16),
    ],
)
def test_a_mismatch_raises_and_leaves_nothing(
    wrong: str, dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    megatron = random_tensors(model)
    reference = PlainLayers(model, megatron, alpha=1.0 if wrong == "alpha" else ALPHA)
    changed = dict(megatron)
    if wrong == "expert":
        changed["decoder.layers.1.mlp.experts.linear_fc1.weight"] = megatron[
            "decoder.layers.1.mlp.experts.linear_fc1.weight"
        ].roll(1, 0)
    if wrong == "norm":
        changed["decoder.layers.1.self_attention.k_layernorm.weight"] = torch.ones(model.head_dim)
    if wrong == "order":
        for layer in range(model.num_layers):
            name = f"decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight"
            changed[name] = megatron[name].roll(model.ffn_hidden_size, 0)
    with pytest.raises(CheckpointError, match="does not compute the same as the model it came from"):
        export(
            model,
            changed,
            tokenizer_folder,
            tmp_path / "out",
            rope_alpha=ALPHA,
            max_position_embeddings=64,
            dtype=dtype,
            reference=reference,
        )
    assert list(tmp_path.iterdir()) == []


def test_nan_is_a_mismatch(tokenizer_folder: Path, tmp_path: Path) -> None:
    class Nan(PlainLayers):
        def walk(self, texts: Any, visit: Any) -> torch.Tensor:
            return super().walk(texts, visit) * float("nan")

    model = tiny_model()
    with pytest.raises(CheckpointError, match="not finite"):
        export_tiny(model, tokenizer_folder, tmp_path / "out", reference=Nan(model, random_tensors(model)))


@pytest.mark.parametrize("file_bytes", [100, 50_000], ids=["config", "weights"])
def test_a_full_disk_is_one_message_and_leaves_nothing(file_bytes: int, tokenizer_folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = tiny_model()
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))  # a longer file fails, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*; nothing was left behind") as told:
            export_tiny(model, tokenizer_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "large" in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "total used free")(10, 9, 1))
    with pytest.raises(
        CheckpointError, match=r"out: cannot be written: .*: the tensors take .* only 1e-09 GB are free"
    ):
        export_tiny(tiny_model(), tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_output_that_is_not_empty(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        export_tiny(tiny_model(), tokenizer_folder, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "keep"


def test_refuses_a_tokenizer_larger_than_the_embedding(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer has 466 tokens, the model's embedding only 300 rows"):
        export_tiny(tiny_model(padded_vocab_size=300), tokenizer_folder, tmp_path / "out")


@native
@pytest.mark.parametrize("is_tied", [True, False])
def test_native_format_loads_with_transformers_own_class(is_tied: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(cla_share_factor=1, moe_router_topk=2, share_embeddings_and_output_weights=is_tied)
    certificate = export_tiny(model, tokenizer_folder, tmp_path / "native", format="hunyuan_v1_moe")
    assert certificate["loaded_with"] == "HunYuanMoEV1ForCausalLM"
    assert certificate["max_abs_difference"] < 1e-4
    assert [path.name for path in (tmp_path / "native").glob("*.py")] == ["tokenization_hy.py"], (
        "for the release's scripts only"
    )


# --- text: the cache, padding, stops, rows that pad the vocabulary ----------------------------------------------------


def test_certificate_covers_text_through_the_cache_and_a_padded_batch(exported: Path) -> None:
    generation = json.loads((exported / "certificate.json").read_text())["generation"]
    assert generation["tokens_other_than_without_a_cache"] == 0
    assert generation["median_relative_difference"] < 1e-4
    assert list(generation["checks"]) == [
        "prompt 0, row 0",
        *(f"left-padded batch, row {row}" for row in range(4)),
    ]
    assert {check["positions"] for check in generation["checks"].values()} == {generation["new_tokens"]}


@pytest.mark.parametrize("fault", ["the cache is ignored", "the padding is ignored", "another token is chosen"])
def test_an_export_whose_generation_is_wrong_is_refused(
    fault: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fault is the effect of a renamed argument: each new token sees only itself, while logits of whole texts
    are correct."""
    forward = HunYuanForCausalLM.forward

    def wrong(self: HunYuanForCausalLM, *args: Any, **options: Any) -> Any:
        if fault == "the cache is ignored" and options.get(CACHE_NAME) is not None:
            options |= {CACHE_NAME: None, "attention_mask": None}
        mask = options.get("attention_mask")
        if fault == "the padding is ignored" and mask is not None:
            options["attention_mask"] = torch.ones_like(mask)
        out = forward(self, *args, **options)
        if fault == "another token is chosen" and options.get(CACHE_NAME) is not None:
            out.logits = out.logits.roll(1, -1)
        return out

    wrong.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(HunYuanForCausalLM, "forward", wrong)
    with pytest.raises(CheckpointError, match=r"generate\(\) of the export"):
        export_tiny(tiny_model(), tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_transformers_loader_generates_an_id_without_a_token(exported: Path) -> None:
    """466 tokens in 480 rows; the padding rows are made the most likely."""
    model = load_model(exported)
    with torch.no_grad():
        model.model.embed_tokens.weight[466:] *= 100
    prompt = torch.tensor([[258, 104, 105]])
    assert int(model(prompt).logits[0, -1].argmax()) >= 466, "the rows are not the likeliest, so this shows nothing"
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 3.0, "top_k": 0}, {"num_beams": 3}):
        torch.manual_seed(0)
        assert int(model.generate(prompt, max_new_tokens=12, **options).max()) < 466
    chosen = transformers.GenerationConfig(max_new_tokens=12, do_sample=False)
    assert int(model.generate(prompt, generation_config=chosen).max()) < 466, "a configuration of the user's own"


def test_a_chat_pipeline_stops_at_the_end_of_an_answer(exported: Path) -> None:
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    answer = [*tokenizer.encode("hey", add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|eos|>")]
    asked: list[int] = []

    def says(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[:, -1, answer[len(asked)]] = 1e4
        asked.append(1)
        return logits

    model.lm_head.register_forward_hook(says)
    chat = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    reply = chat([{"role": "user", "content": "hello <|eos|>"}], max_new_tokens=20)[0]["generated_text"][-1]
    assert reply == {"role": "assistant", "content": "hey"}
    assert len(asked) == len(answer)


@pytest.mark.parametrize("last", ["<|endoftext|>", "<|eos|>"])
def test_generation_stops_at_the_end_of_a_document_and_of_an_answer(last: str, exported: Path) -> None:
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    text = [*tokenizer.encode("hey", add_special_tokens=False), tokenizer.convert_tokens_to_ids(last)]
    steps: list[int] = []

    def says(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[:, -1, text[len(steps)] if len(steps) < len(text) else 104] = 1e4
        steps.append(1)
        return logits

    model.lm_head.register_forward_hook(says)
    prompt = tokenizer("hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :].tolist() == text


def test_a_saved_model_keeps_the_code_that_loads_it(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user saves it after loading it with the folder's own code, for instance after training."""
    own_module_cache(monkeypatch, tmp_path / "modules")
    tokens = torch.arange(3, 40)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "once")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    again.save_pretrained(tmp_path / "twice")
    assert {name: sha256_of(tmp_path / "twice" / name) for name in MODEL_CODE} == {
        name: sha256_of(exported / name) for name in MODEL_CODE
    }
    with torch.inference_mode():
        expected = loaded(tokens).logits
        for folder in ("once", "twice"):
            # load_model uses our own classes, because the code is unchanged
            torch.testing.assert_close(load_model(tmp_path / folder)(tokens).logits, expected, rtol=0, atol=1e-5)
    kept = json.loads((tmp_path / "twice" / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["suppress_tokens"]) == ([257, 260], list(range(466, 480)))


def test_loading_the_tokenizer_never_asks_for_permission_to_run_code(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoTokenizer reads config.json first and, unless told, asks about the model's code; without an answer it
    continues."""
    questions = []

    def nobody_is_there(question: str) -> str:
        questions.append(question)
        raise EOFError

    def foreign() -> set[str]:
        return {name for name in sys.modules if name.startswith("transformers_modules")}

    before = foreign()
    monkeypatch.setattr("builtins.input", nobody_is_there)
    expected = load_tokenizer(exported)("hello")["input_ids"]
    assert AutoTokenizer.from_pretrained(exported, trust_remote_code=False)("hello")["input_ids"] == expected
    assert questions == []
    assert AutoTokenizer.from_pretrained(exported)("hello")["input_ids"] == expected
    assert foreign() == before


# --- what else loads it, and whose files they are ---------------------------------------------------------------------


@pytest.mark.parametrize("installed", ["5.0.0", "5.19.0"])
def test_native_format_is_not_certified_by_a_version_that_computes_something_else(
    installed: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hunyuan_pretrain.checkpoint.loaders.version", lambda _: installed)
    model = tiny_model(cla_share_factor=1, moe_router_topk=2)
    with pytest.raises(
        CheckpointError, match=rf"transformers {installed} computes .*another RoPE.*install transformers>=5\.20"
    ):
        export_tiny(model, tokenizer_folder, tmp_path / "out", format="hunyuan_v1_moe")
    assert list(tmp_path.iterdir()) == []


@native
def test_native_format_equals_this_model_beyond_its_positions(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Transformers up to 5.19 used another RoPE base there, which is why those versions are refused."""
    model = tiny_model(cla_share_factor=1, moe_router_topk=2)
    export_tiny(model, tokenizer_folder, tmp_path / "out", format="hunyuan_v1_moe", max_position_embeddings=48)
    tokens = torch.randint(466, (1, 80), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = load_model(tmp_path / "out")(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, reference_logits(model, random_tensors(model))(tokens), rtol=0, atol=1e-4)


def test_the_released_scripts_find_their_tokenizer(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that they copy, ids under the names that they use, start and end of a document; and it is not the
    tokenizer of the export."""
    own_module_cache(monkeypatch, tmp_path / "modules")
    assert "auto_map" not in json.loads((exported / "tokenizer_config.json").read_text())
    for folder in (exported, exported / "release_tokenizer"):
        names = ("generation_config.json", "hy.tiktoken", "tokenizer_config.json", "tokenization_hy.py")
        assert [name for name in names if not (folder / name).is_file()] == []
    ours, theirs = (
        Tokenizer.load(exported),
        AutoTokenizer.from_pretrained(exported / "release_tokenizer", trust_remote_code=True),
    )
    assert type(theirs).__name__ == "HYTokenizer"
    assert (theirs.bod_id, theirs.eod_id, theirs.pad_id, theirs.vocab_size) == (
        ours.start_id,
        ours.end_id,
        ours.pad_id,
        ours.vocab_size,
    )
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (258, 257, 261, 466)
    for text in ("hello he", "caf\u00e9 e\u0301 \U0001f642 \u5e8a"):
        assert theirs(text)["input_ids"] == ours.encode_document(text).tolist()
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs("<|eos|>", add_special_tokens=False)["input_ids"] == [ours.eos_id]
    theirs.save_pretrained(tmp_path / "again")
    assert sha256_of(tmp_path / "again/hy.tiktoken") == sha256_of(exported / "hy.tiktoken")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_of_an_export_have_the_mode_that_the_umask_gives(
    umask: int, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        export_tiny(tiny_model(), tokenizer_folder, tmp_path / "out", max_shard_bytes=40_000)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out/release_tokenizer")} == {
        0o777 & ~umask
    }
