"""What others do with an export in training and in several places: accelerate, PEFT, and TRL's SFTTrainer.

They run where these packages are, in processes that tests/reference/test_versions.py starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

accelerate, datasets, peft, trl = (
    pytest.importorskip(package, reason="runs in the processes of test_versions.py")
    for package in ("accelerate", "datasets", "peft", "trl")
)

TEXTS = ["hello he he", "the quick brown fox", "the lazy dog", "he"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of four layers in two CLA groups."""
    root = tmp_path_factory.mktemp("peers")
    export_tiny(tiny_model(num_layers=4), write_tiny_tokenizer(root), root / "export")
    return root / "export"


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load(folder)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


TOKENS = torch.arange(12).view(2, 6) * 7


def test_a_device_map_changes_nothing(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """Layers of one CLA group on the CPU and on disk: keys and values of the owner cross from one to the other."""
    places = {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.norm": "cpu",
        **{f"model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)},
    }
    spread = load(folder, device_map=places, offload_folder=tmp_path)
    assert any(hasattr(module, "_hf_hook") for module in spread.modules())
    assert spread.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(spread(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    assert spread.generate(TOKENS, **options).tolist() == model.generate(TOKENS, **options).tolist()
    assert load(folder, device_map="auto").model.layers[1].self_attn.q_proj.weight.device.type == "cpu"


def test_a_lora_adapter_trains_and_loads(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """One step: only the adapter moves. Saved, loaded on the export again and merged, it computes the same."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj", "wg"]
        ),
    )
    loss = adapted(TOKENS, labels=TOKENS).loss
    with torch.no_grad():
        assert torch.equal(loss, load(folder)(TOKENS, labels=TOKENS).loss), "an adapter begins as zero"
    optimizer = torch.optim.SGD([tensor for tensor in adapted.parameters() if tensor.requires_grad], lr=0.5)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        trained = adapted(TOKENS, labels=TOKENS)
    assert trained.loss < loss
    after = adapted.get_base_model().state_dict()
    assert all(torch.equal(after[name if name in after else _wrapped(name)], tensor) for name, tensor in before.items())
    router = adapted.get_base_model().model.layers[0].mlp.gate.wg.lora_B["default"].weight
    assert router.any(), "an adapter on the router takes part"
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, trained.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.merge_and_unload()(TOKENS).logits, trained.logits, rtol=0, atol=1e-5)


def _wrapped(name: str) -> str:
    """The name of a weight that PEFT has wrapped."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


@pytest.mark.parametrize("way", ["padded", "packed", "checkpointed"])
def test_a_step_of_sft_trainer(way: str, model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    """Its loss is the mean over the tokens of all texts, each alone: neither padding nor the pack nor recomputed
    layers mix them. The weights of an owner and of a borrower move."""
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    with torch.no_grad():
        sums = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    expected = float(sum(sums)) / sum(len(row) - 1 for row in rows)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    options: dict[str, Any] = {"packing": True, "max_length": 128} if way == "packed" else {"packing": False}
    if way == "checkpointed":
        options["gradient_checkpointing"] = True
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        learning_rate=0.01,
        **options,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    done = trainer.train()
    if way != "packed" and not hasattr(trainer, "_loss_shifts_labels"):
        # older transformers divide by the first token of each row too, although nothing predicts it
        expected *= sum(len(row) - 1 for row in rows) / sum(map(len, rows))
    assert done.training_loss == pytest.approx(expected, rel=1e-5)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    for layer in (0, 1):
        assert f"model.layers.{layer}.self_attn.q_proj.weight" in moved
    # the checkpoint that it wrote is an export's folder again: it loads with its own code
    saved = next(tmp_path.glob("checkpoint-*"))
    assert {"modeling_hunyuan.py", "configuration_hunyuan.py"} <= set(os.listdir(saved))
    assert json.loads((saved / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].endswith(
        "modeling_hunyuan.HunYuanForCausalLM"
    )
    with torch.no_grad():
        torch.testing.assert_close(load(saved)(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
