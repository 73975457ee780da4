"""The certificate layer by layer: one layer in memory on each side, and an error in one of many is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError, certificate
from hunyuan_pretrain.checkpoint.differences import TOLERANCES, compare_logits
from hunyuan_pretrain.checkpoint.exported_layers import Export, ExportedLayers
from hunyuan_pretrain.checkpoint.generate import load_model
from hunyuan_pretrain.checkpoint.layerwise import compare_layers
from hunyuan_pretrain.checkpoint.loaders import NATIVE_SINCE
from hunyuan_pretrain.checkpoint.training_layers import TrainingLayers
from tests.helpers import tiny
from tests.helpers.tiny_export import ALPHA, export_tiny, random_tensors, tiny_model, write_tiny_tokenizer

DEEP = {"num_layers": 24, "ffn_hidden_size": 48}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def training(model: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> TrainingLayers:
    return TrainingLayers(model, tensors, tiny.world_of_one(), rope_alpha=ALPHA, dtype=dtype)


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(466, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "tiny"
    model = tiny_model(num_layers=4)
    export_tiny(model, tokenizer_folder, output, reference=training(model, random_tensors(model)))
    return output


def test_both_sides_compute_the_same_in_every_layer(exported: Path, tmp_path: Path) -> None:
    """With a borrowing layer in each group, and either side as the reference, as for an import."""
    model = tiny_model(num_layers=4)
    sides = [training(model, random_tensors(model)), ExportedLayers(Export.read(exported))]
    for reference, candidate in (sides, sides[::-1]):
        found = compare_layers(reference, candidate, texts(20, 1, 33), tmp_path, outlier=1e-3)
        assert [layer["layer"] for layer in found.layers] == [0, 1, 2, 3]
        assert max(layer["largest"] for layer in found.layers) < 1e-4
        assert max(layer["accumulated"] for layer in found.layers) < 1e-4
        torch.testing.assert_close(found.candidate_TV, found.reference_TV, rtol=0, atol=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_one_walk_do_not_see_each_other(exported: Path) -> None:
    rows = texts(20, 1, 33)
    for source in (
        ExportedLayers(Export.read(exported)),
        training(tiny_model(num_layers=4), random_tensors(tiny_model(num_layers=4))),
    ):
        together = source.walk(rows, lambda *_: None).split([20, 1, 33])
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(source.walk([row], lambda *_: None), logits, rtol=0, atol=1e-5)


def test_a_streamed_export_generates_what_a_loaded_one_does(exported: Path) -> None:
    """Through the cache, with left padding."""
    tokens, mask = torch.stack(texts(9, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    expected = load_model(exported).generate(tokens, **options)
    assert torch.equal(ExportedLayers(Export.read(exported)).model.generate(tokens, **options), expected)


def test_an_error_in_one_layer_of_many_is_found_in_bf16(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Two experts of one of 24 layers are exchanged: the logits are within their tolerance, the layer is not."""
    dtype, model = torch.bfloat16, tiny_model(**DEEP)
    right = random_tensors(model)
    wrong = dict(right)
    name = "decoder.layers.20.mlp.experts.linear_fc1.weight"
    wrong[name] = right[name].roll(1, 0)
    walked = [training(model, tensors, dtype).walk(texts(64, 64), lambda *_: None) for tensors in (right, wrong)]
    assert compare_logits(*walked, 480)["per_position"].median() < TOLERANCES[dtype]["median"]

    certificate = export_tiny(
        model, tokenizer_folder, tmp_path / "right", dtype=dtype, reference=training(model, right, dtype)
    )
    assert certificate["layers"]["median_relative_difference"] < TOLERANCES[dtype]["layer_median"] / 2
    with pytest.raises(CheckpointError, match=r"layer 20, given the same input, adds something else") as told:
        export_tiny(model, tokenizer_folder, tmp_path / "wrong", dtype=dtype, reference=training(model, wrong, dtype))
    assert "does not compute the same as the model it came from" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize("format", ["hunyuan", "hunyuan_v1_moe"])
def test_a_model_that_does_not_fit_is_checked_all_the_same(
    format: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if format == "hunyuan_v1_moe" and installed < NATIVE_SINCE:
        pytest.skip("this transformers computes another model")
    monkeypatch.setattr(certificate, "free_memory_bytes", lambda: 1_000)
    monkeypatch.setattr(certificate, "load_model", lambda *_: pytest.fail("it does not fit"))
    model = tiny_model(cla_share_factor=1, moe_router_topk=2)
    found = export_tiny(
        model, tokenizer_folder, tmp_path / "out", format=format, reference=training(model, random_tensors(model))
    )
    assert found["loaded_as_a_whole"].startswith("no: it has")
    assert found["loaded_with"] == "HunYuanForCausalLM"
    assert found["max_abs_difference"] < 1e-4
    assert found["generation"]["tokens_other_than_without_a_cache"] == 0
    assert len(found["layers"]["checks"]) == 2
    assert (
        json.loads((tmp_path / "out/certificate.json").read_text())["loaded_as_a_whole"] == found["loaded_as_a_whole"]
    )


def test_tensors_that_are_not_those_of_the_configuration_are_refused(exported: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(exported, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    for change, problem in (
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.input_layernorm\.weight: missing"),
        ({"num_hidden_layers": 3}, r"model\.layers\.3\.input_layernorm\.weight: not a tensor of this model"),
        ({"moe_intermediate_size": 25}, r"shape \(24, 32\), but this model has \(25, 32\)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=problem):
            Export.read(folder)


def test_models_of_other_depths_are_not_compared(exported: Path, tmp_path: Path) -> None:
    other = tiny_model(num_layers=2)
    with pytest.raises(CheckpointError, match="4 layers, the model it came from has 2"):
        compare_layers(
            training(other, random_tensors(other)), ExportedLayers(Export.read(exported)), texts(4), tmp_path, 1e-3
        )
