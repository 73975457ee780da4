"""Generating text from an exported folder, and whose code runs for it."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.generate import carries_our_code, generate, load_model
from tests.helpers.tiny_export import export_tiny, own_module_cache, tiny_model, write_tiny_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    export_tiny(tiny_model(), write_tiny_tokenizer(folder), folder / "export")
    return folder / "export"


@pytest.fixture
def foreign(exported: Path, tmp_path: Path) -> Path:
    """The same export with code that is not ours: it leaves a trace when it runs."""
    shutil.copytree(exported, tmp_path / "foreign")
    code = tmp_path / "foreign" / "modeling_hunyuan.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return tmp_path / "foreign"


def test_streams_what_it_returns(exported: Path) -> None:
    out = io.StringIO()
    text = generate(exported, "hello", max_new_tokens=12, out=out)
    assert text
    assert out.getvalue() == text + "\n"


def test_writes_to_standard_output(exported: Path, capsys: pytest.CaptureFixture) -> None:
    text = generate(exported, "hello", max_new_tokens=5)
    assert capsys.readouterr().out == text + "\n"


def test_the_seed_determines_the_samples(exported: Path) -> None:
    def draw(**options: object) -> str:
        return generate(exported, "hello", max_new_tokens=16, top_p=1.0, top_k=0, out=io.StringIO(), **options)

    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    assert draw(temperature=0, seed=1) == draw(temperature=0, seed=2)


def test_never_samples_a_row_that_pads_the_vocabulary(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """466 tokens in 480 rows; the padding rows are made the most likely."""
    model = load_model(exported)
    with torch.no_grad():
        model.model.embed_tokens.weight[466:] *= 100
    monkeypatch.setattr("hunyuan_pretrain.checkpoint.generate.load_model", lambda *_, **__: model)
    seen = []
    sample = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **options: seen.append(sample(*args, **options)) or seen[-1])
    generate(exported, "hello", max_new_tokens=16, temperature=2.0, out=io.StringIO())
    assert int(seen[0].max()) < 466


def test_chat_uses_the_template_and_stops_at_the_end_of_an_answer(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(exported)
    monkeypatch.setattr("hunyuan_pretrain.checkpoint.generate.load_model", lambda *_, **__: model)
    asked = {}
    sample = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **options: asked.update(options, ids=ids) or sample(ids, **options)
    )
    generate(exported, "a", chat=True, max_new_tokens=2, out=io.StringIO())
    start, end_of_document, end_of_answer, end_of_user = 258, 257, 260, 262
    assert asked["ids"].tolist() == [[start, ord("a"), end_of_user]]
    assert asked["eos_token_id"] == [end_of_document, end_of_answer]


def test_refuses_more_text_than_the_model_has_positions(exported: Path) -> None:
    with pytest.raises(
        CheckpointError, match="max_new_tokens=5000 are more than the 4096 positions of this model; use at most 4091"
    ):
        generate(exported, "hello", max_new_tokens=5000)


def test_a_prompt_that_is_too_long_is_refused_with_its_length(exported: Path) -> None:
    message = "the prompt has 5001 tokens, and this model has 4096 positions.*shorten the prompt by at least 906 tokens"
    with pytest.raises(CheckpointError, match=message):
        generate(exported, "x" * 5000)


def test_names_of_special_tokens_in_a_prompt_are_text(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(exported)
    monkeypatch.setattr("hunyuan_pretrain.checkpoint.generate.load_model", lambda *_, **__: model)
    asked = []
    sample = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **options: asked.append(ids) or sample(ids, **options))
    generate(exported, "a<|eos|>", max_new_tokens=1, out=io.StringIO())
    generate(exported, "a<|eos|>", chat=True, max_new_tokens=1, out=io.StringIO())
    assert asked[0].tolist() == [[258, *b"a<|eos|>"]]
    assert asked[1].tolist() == [[258, *b"a<|eos|>", 262]]


def test_our_own_export_loads_without_running_its_code(exported: Path) -> None:
    assert carries_our_code(exported)
    before = set(sys.modules)
    model = load_model(exported)
    assert type(model).__module__ == "hunyuan_pretrain.checkpoint.modeling_hunyuan"
    assert not [name for name in set(sys.modules) - before if name.startswith("transformers_modules")]


def test_foreign_code_does_not_run_without_permission(foreign: Path, tmp_path: Path) -> None:
    assert not carries_our_code(foreign)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_model(foreign)
    assert not (tmp_path / "ran").exists()


def test_foreign_code_runs_with_permission(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_module_cache(monkeypatch, tmp_path / "modules")
    model = load_model(foreign, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(model).__module__.startswith("transformers_modules")


def test_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json, so this is not an exported model"):
        load_model(tmp_path)


def test_refuses_weights_with_a_missing_tensor(exported: Path, tmp_path: Path) -> None:
    """transformers would continue with random numbers in its place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(exported, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["model.layers.1.mlp.gate.wg.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys: \['model\.layers\.1\.mlp\.gate\.wg\.weight'\]"):
        load_model(tmp_path / "broken")


def test_refuses_a_folder_without_weights(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match="no file named"):
        load_model(tmp_path / "empty")
