"""Fine-tuning here and with TRL, from one export, on the same conversations in the same order: the losses of every step
are equal.

Equal on both sides: fp32, AdamW, one constant learning rate for all weights, clipping, no router losses. Here
conversations are packed and a step has several micro-batches; TRL gets the texts, lays them out with the export's chat
template, pads them to the longest of the step, and computes the step as one batch. They run where TRL is, in processes
that tests/reference/test_versions.py starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.chat import ChatForm, PairForm
from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.checkpoint.hf_import import import_model
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.loader import MicroBatch, StepLoader
from tests.helpers.runs import experiment_fields, metrics, run_forked, write_experiment
from tests.helpers.tiny_export import ALPHA, export_tiny, tiny_model, write_tiny_tokenizer

datasets, trl = (
    pytest.importorskip(package, reason="runs in the processes of test_versions.py") for package in ("datasets", "trl")
)

SFT_STEPS, DPO_STEPS = 20, 10
LENGTH, SEQUENCES = 256, 2
SYSTEM_PROMPT = "Be brief."
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}
EPSILON, CLIP, RATE = 1e-8, 1.0, 1e-3
BETA, SFT_WEIGHT = 0.5, 0.2
TOLERANCE = 2e-5
"""Nats; ten times the largest difference found. Sums in fp32 are in another order, over all updates; no token has two
experts so near each other that rounding would choose between them."""

Record = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """export: of a model of four layers with random weights; start: the same as a checkpoint; tokenizer."""
    root = tmp_path_factory.mktemp("trl")
    model = tiny_model(num_layers=4, moe_routing_group_tokens=32)
    export_tiny(model, write_tiny_tokenizer(root), root / "export", system_prompt=SYSTEM_PROMPT)
    import_model(root / "export", root / "start")
    return root


def text(draw: np.random.Generator) -> str:
    words = ["the", "he", "hello", "fox", "明月", "dog", "quick"]
    return " ".join(draw.choice(words, draw.integers(1, 5)))


def conversations(count: int) -> Iterator[Record]:
    """Of one to three turns, some with a system prompt of their own."""
    draw = np.random.default_rng(5)
    for number in range(count):
        own = [{"role": "system", "content": text(draw)}] if number % 5 == 0 else []
        turns = draw.integers(1, 4)
        asked = [{"role": role, "content": text(draw)} for _ in range(turns) for role in ("user", "assistant")]
        yield {"messages": own + asked}


def pairs(count: int) -> Iterator[Record]:
    """After one or two turns."""
    for record in conversations(count):
        *prompt, last = record["messages"]
        rejected = {"role": "assistant", "content": last["content"][::-1] + " dog"}
        yield {"prompt": prompt, "chosen": [last], "rejected": [rejected]}


def prepared(folder: Path, records: list[Record], steps: int, form: ChatForm, **stage: Any) -> Experiment:
    """Packs the records; returns the experiment that trains on them."""
    task = stage["task"]
    with (folder / f"{task}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    tokenize([str(folder / f"{task}.jsonl")], str(folder), str(folder / f"{task}_tokens"), form=form)
    pack([str(folder / f"{task}_tokens")], LENGTH, str(folder / f"{task}_packed"), seed=1)
    model = tiny_model(num_layers=4, moe_routing_group_tokens=32).model_dump(mode="json")
    fields = experiment_fields(folder, folder / task, model=model, tokenizer=str(folder))
    fields["stages"] = [
        {
            "name": task,
            "tokens": steps * SEQUENCES * LENGTH,
            "sequence_length": LENGTH,
            "global_batch_sequences": SEQUENCES,
            "rope_alpha": ALPHA,
            "lr_end": 1.0,
            "lr_shape": "constant",
            "data": [{"path": str(folder / f"{task}_packed")}],
        }
        | stage
    ]
    fields["optimizer"] = {"lr": RATE, "adam_eps": EPSILON, "clip_grad": CLIP, "expert_lr_ratio": 1.0, **ADAM}
    fields["checkpoint"] = {"init_from": str(folder / "start")}
    return Experiment.model_validate(fields)


def losses_here(experiment: Experiment) -> list[float]:
    """Of every step of the run."""
    run_dir = Path(experiment.run_dir)
    path = write_experiment(run_dir.with_suffix(".yaml"), experiment.model_dump(mode="json"))
    status, _, error = run_forked("train", path, timeout_s=600)
    assert status == 0, error
    return [record["loss"] for record in metrics(run_dir) if "loss" in record]


def read(experiment: Experiment) -> tuple[list[list[int]], list[list[tuple[list[int], list[int]]]]]:
    """Of each step: the records that it reads, and their token ids with the ids that are predicted, as it reads
    them."""
    loader = StepLoader(experiment, 0, 1, None)
    numbers, rows = [], []
    for step in range(loader.num_steps):
        batches = loader.micro_batches(step)
        sequences = loader.order.sequences(step, np.concatenate([batch.sequence_ids for batch in batches]))
        numbers.append([document for data, row in sequences for document, _, _ in data.documents(row)])
        rows.append([row for batch in batches for row in rows_of(batch)])
    loader.close()
    return numbers, rows


def rows_of(batch: MicroBatch) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels as trainers write them) of each piece with a target: tail padding has none."""
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        counts = batch.loss_mask_T[start : end - 1] > 0
        if counts.any():
            ids = batch.tokens_T[start:end]
            yield ids.tolist(), [-100, *torch.where(counts, ids[1:], -100).tolist()]


def settings(output: Path, steps: int, batch: int) -> dict[str, Any]:
    """Of either trainer."""
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "gradient_checkpointing": False,
        "max_length": None,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        **ADAM,
    }


def in_order(trainer: Any, steps: list[list[int]]) -> Any:
    """The trainer, with the rows of each step as one batch, and `losses` of the batches."""

    class Ordered(trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            bounds = np.cumsum([0, *map(len, steps)])
            batches = [list(range(a, b)) for a, b in pairwise(bounds)]
            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return loss

    return Ordered


def peer(trainer: Any, folder: Path, arguments: Any, records: list[Record], steps: list[list[int]]) -> Any:
    """A trainer of TRL on the export, with the records of each step as its rows."""
    return in_order(trainer, steps)(
        model=AutoModelForCausalLM.from_pretrained(folder / "export", trust_remote_code=True),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([records[number] for step in steps for number in step]),
        processing_class=AutoTokenizer.from_pretrained(folder / "export", trust_remote_code=False),
    )


def test_twenty_steps_of_sft(folder: Path, tmp_path: Path) -> None:
    records = list(conversations(80))
    form = ChatForm(system_prompt=SYSTEM_PROMPT)
    experiment = prepared(folder, records, SFT_STEPS, form, task="sft")
    numbers, rows = read(experiment)
    options = settings(tmp_path, SFT_STEPS, max(map(len, numbers)))
    arguments = trl.SFTConfig(**options, assistant_only_loss=True, packing=False)
    trainer = peer(trl.SFTTrainer, folder, arguments, records, numbers)
    flat = [row for step in rows for row in step]
    assert list(trainer.train_dataset["input_ids"]) == [ids for ids, _ in flat]
    assert list(trainer.train_dataset["labels"]) == [labels for _, labels in flat]
    trainer.train()
    ours = losses_here(experiment)
    assert ours[-1] < ours[0] - 0.5, "hardly trained"
    np.testing.assert_allclose(trainer.losses, ours, rtol=0, atol=TOLERANCE)


def test_ten_steps_of_dpo(folder: Path, tmp_path: Path) -> None:
    """With the cross-entropy of the chosen answers; the start is the reference."""
    records = list(pairs(80))
    form = PairForm(system_prompt=SYSTEM_PROMPT)
    weights = {"dpo_beta": BETA, "dpo_sft_weight": SFT_WEIGHT}
    experiment = prepared(folder, records, DPO_STEPS, form, task="dpo", **weights)
    numbers, rows = read(experiment)
    options = settings(tmp_path, DPO_STEPS, max(map(len, numbers)))
    arguments = trl.DPOConfig(
        **options, trust_remote_code=True, beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[1.0, SFT_WEIGHT]
    )
    trainer = peer(trl.DPOTrainer, folder, arguments, records, numbers)
    flat = [row for step in rows for row in step]
    expected = [
        (row["prompt_ids"] + row[answer], [-100] * len(row["prompt_ids"]) + row[answer])
        for row in trainer.train_dataset
        for answer in ("chosen_ids", "rejected_ids")
    ]
    assert flat == expected
    trainer.train()
    ours = losses_here(experiment)
    assert ours[-1] < ours[0] - 0.1, "hardly trained"
    np.testing.assert_allclose(trainer.losses, ours, rtol=0, atol=TOLERANCE)
