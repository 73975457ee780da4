"""What loads an export and what does not: reasons, measured errors, and the table of docs/guide/loaders.md."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hunyuan_pretrain.checkpoint import CheckpointError, hf_export
from hunyuan_pretrain.checkpoint.loaders import MEASURED, NATIVE_SINCE, loads_in, refuse_what_loads_wrongly
from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM
from tests.helpers.tiny_export import export_tiny, random_tensors, reference_logits, tiny_model, write_tiny_tokenizer

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "docs/guide/loaders.md"
PLAIN = {"cla_share_factor": 1, "moe_router_topk": 2}
"""What hunyuan_v1_moe expresses."""

native = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < NATIVE_SINCE,
    reason="this transformers computes another model",
)


# --- the native format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason", "would_load"),
    [
        (
            {},
            "cla_share_factor=2: it would fill the keys and values of borrowing layers with random numbers (logits off "
            "by 59% of their spread",
            "a model trained with cla_share_factor: 1, moe_router_topk: 2 would load",
        ),
        (
            {"cla_share_factor": 1},
            "moe_router_topk=1: transformers renormalises the weight of the only expert to 1, where this model uses "
            "its probability (logits off by 56%",
            "a model trained with moe_router_topk: 2 would load",
        ),
        (
            PLAIN | {"qk_layernorm": False},
            "qk_layernorm=false: it always normalises queries and keys (logits off by 49%",
            "a model trained with qk_layernorm: true would load",
        ),
        (
            PLAIN | {"moe_ffn_hidden_size": 20},
            "moe_ffn_hidden_size=20: transformers gives routed experts the width of the shared one, 24",
            "a model trained with moe_ffn_hidden_size: null would load",
        ),
    ],
)
def test_native_format_refuses_models_that_would_load_wrongly(
    change: dict, reason: str, would_load: str, tmp_path: Path
) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    with pytest.raises(CheckpointError) as error:
        export_tiny(tiny_model(**change), folder, tmp_path / "out", format="hunyuan_v1_moe")
    assert reason in str(error.value)
    assert would_load in str(error.value)
    assert not (tmp_path / "out").exists()


def loaded_nevertheless(change: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far transformers' own class is off if the model is exported in its format without any check: the measure of
    MEASURED."""
    model = tiny_model(num_layers=4, **change)
    monkeypatch.setattr(hf_export, "refuse_what_loads_wrongly", lambda *_: None)
    monkeypatch.setattr(
        hf_export,
        "certify",
        lambda *_, **__: {"versions": {"hunyuan-pretrain": ""}, "loads_in": loads_in(model, "hunyuan")},
    )
    export_tiny(model, write_tiny_tokenizer(folder), folder / "out", format="hunyuan_v1_moe")
    torch.manual_seed(0)  # of the weights that it does not find
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    tokens = torch.randint(466, (4, 32), generator=torch.Generator().manual_seed(0))
    expected = reference_logits(model, random_tensors(model))(tokens).double()
    with torch.no_grad():
        difference = loaded(tokens).logits.double() - expected
    spreads = [(each - each.mean(-1, keepdim=True)).pow(2).mean(-1).sqrt() for each in (difference, expected)]
    return (spreads[0] / spreads[1]).median().item()


@native
@pytest.mark.parametrize(
    ("which", "change"),
    [
        ("cla", {"moe_router_topk": 2}),
        ("top-1", {"cla_share_factor": 1}),
        ("no qk norm", PLAIN | {"qk_layernorm": False}),
        ("cla and top-1", {}),
    ],
)
def test_the_native_class_is_as_wrong_as_the_refusal_says(
    which: str, change: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails because the error is small, transformers computes the model now: allow it."""
    assert loaded_nevertheless(change, tmp_path, monkeypatch) == pytest.approx(MEASURED[which], rel=0.2)


@native
def test_the_native_class_is_right_for_what_it_expresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded_nevertheless(PLAIN, tmp_path, monkeypatch) < 1e-5


@native
def test_the_native_class_refuses_experts_of_another_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded_nevertheless(PLAIN | {"moe_ffn_hidden_size": 20}, tmp_path, monkeypatch)


# --- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, ["attn_k of a borrowing layer is missing", "(logits off by 43% of their spread"]),
        ({"cla_share_factor": 1}, ["renormalises the weight of the only expert to 1"]),
        (PLAIN | {"qk_layernorm": False}, ["needs the norms of queries and keys"]),
        (PLAIN, ["llama.cpp would compute this model, but nothing here could certify the file, so none is written"]),
    ],
)
def test_gguf_is_refused_with_the_reason(change: dict, reasons: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        export_tiny(tiny_model(**change), write_tiny_tokenizer(tmp_path), tmp_path / "out", format="gguf")
    assert str(error.value).startswith("format gguf: ")
    assert [reason for reason in reasons if reason not in str(error.value)] == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="format 'onnx': must be hunyuan or hunyuan_v1_moe"):
        refuse_what_loads_wrongly(tiny_model(), "onnx")  # type: ignore[arg-type]


def test_servers_refuse_our_model_code_instead_of_running_it_with_another_attention() -> None:
    """vLLM and SGLang ask a model without an implementation of theirs whether it can run on their attention. If it
    said yes, CLA would be computed without the owner's keys."""
    assert not HunYuanForCausalLM.is_backend_compatible()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"moe_ffn_hidden_size": 20}, "moe_ffn_hidden_size=20: it gives every expert the width 24"),
        ({"kv_channels": 12}, "kv_channels=12: its heads have the width hidden_size / num_attention_heads"),
        ({"num_moe_experts": 1}, "num_moe_experts=1: it builds a layer without a router"),
    ],
)
def test_certificate_names_what_the_released_code_cannot_load(change: dict, reason: str) -> None:
    (release,) = (loader for name, loader in loads_in(tiny_model(**change), "hunyuan").items() if "release" in name)
    assert release == {"loads": False, "reasons": [reason]}


def test_certificate_names_what_loads_the_export() -> None:
    large = loads_in(tiny_model(), "hunyuan")
    assert large["transformers"]["versions"] == ">=5.0"
    assert [loader["loads"] for loader in large.values()] == [True, False, True, True, False, False, False, False]
    assert "cla_share_factor=2" in " ".join(large["transformers without code of this folder"]["reasons"])
    plain = loads_in(tiny_model(**PLAIN), "hunyuan_v1_moe")
    assert plain["transformers"]["versions"] == ">=5.20"
    assert [loader["loads"] for loader in plain.values()] == [True, True, False, False, True, True, True, False]
    assert json.dumps([large, plain])


# --- the table of docs/guide/loaders.md -------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """Cells of each row of the page's table of programs."""
    lines = re.findall(r"^\| (.+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [re.split(r" \| ", line) for line in lines]
    return [row for row in cells if row[0] != "program" and not row[0].startswith("-")]


def test_the_table_has_a_row_for_every_program_of_a_certificate() -> None:
    named = " ".join(row[0] for row in rows())
    for program in loads_in(tiny_model(), "hunyuan"):
        assert program.split(" (")[0].removesuffix(" without code of this folder") in named


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}, {row[2]}")
def test_a_row_of_the_table_has_a_test_or_says_that_it_was_read_or_run_by_hand(row: list[str]) -> None:
    assert len(row) == 5, "program, version, format, result, how"
    named = re.findall(r"`(\w+)` in `(tests/[\w./]+\.py)`", row[-1])
    by_hand = re.match(r"(read|run by hand, 20\d\d-\d\d-\d\d)", row[-1])
    assert named or by_hand
    for function, file in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in found, f"{file} has no {function}"


def test_the_page_states_every_measured_error() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert [value for value in MEASURED.values() if f"{value:.2f}" not in text] == []
