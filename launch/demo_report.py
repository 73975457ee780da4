"""The demo's report: bits per byte compared with a unigram model, tables, and the loss curve."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """The target tokens of validation, and their cost under a unigram model."""

    target_tokens: int
    utf8_bytes: int
    """UTF-8 bytes of the text that the target tokens stand for; <|endoftext|> is a target and counts 0 bytes."""
    unigram_nats: float
    """-log p summed over the target tokens."""

    def bits_per_byte(self, loss: float) -> float:
        """Bits per byte of a model with this mean loss (nats per target token): its nats summed over all targets / ln 2
        / utf8_bytes."""
        return loss * self.target_tokens / math.log(2) / self.utf8_bytes

    @property
    def unigram_bits_per_byte(self) -> float:
        """Bits per byte of the unigram model on the same targets."""
        return self.unigram_nats / math.log(2) / self.utf8_bytes


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of text of each id; 0 for special tokens."""
    return tokenizer.token_bytes


def unigram_log_probabilities(shards: Iterable[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """(V,) ln((count + 1) / (total + V)) per id; <|startoftext|> is not counted, because it is never predicted."""
    counts = np.zeros(tokenizer.vocab_size)
    for tokens in shards:
        counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
    counts[tokenizer.start_id] = 0
    logarithms: np.ndarray = np.log((counts + 1) / (counts.sum() + len(counts)))
    return logarithms


def measure_heldout(experiment: Experiment, training_tokens: Path) -> HeldOut:
    """Measure the validation targets of an experiment: their number, their bytes, and their cost under a unigram model
    of the tokenized folder `training_tokens`."""
    assert experiment.evaluation.data is not None
    tokenizer = Tokenizer.load(experiment.tokenizer)
    heldout = PackedDataset(experiment.evaluation.data, tokenizer.digest)
    sequences = [heldout[i] for i in range(min(len(heldout), experiment.evaluation.max_sequences or len(heldout)))]
    targets = np.concatenate([sequence.labels[sequence.loss_mask] for sequence in sequences])
    log_probabilities = unigram_log_probabilities(
        (shard.tokens for shard in TokenizedDataset(training_tokens).shards), tokenizer
    )
    return HeldOut(len(targets), int(tokenizer.token_bytes[targets].sum()), -float(log_probabilities[targets].sum()))


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl of a run."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @classmethod
    def read(cls, run_dir: Path) -> Metrics:
        """Read the records of training steps and of validations, in order."""
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls([r for r in records if "loss" in r], [r for r in records if "validation_loss" in r])

    @property
    def tokens_per_s(self) -> float:
        """Median over the recorded steps."""
        return statistics.median(record["tokens_per_s"] for record in self.steps)

    def layers(self) -> list[tuple[float, float, float]]:
        """(load, recycled, dropped) per layer, averaged over the last tenth of the records. load: the busiest expert's
        choices over the even share; recycled, dropped: shares of all choices."""
        last = self.steps[-max(1, len(self.steps) // 10) :]
        load_LE = np.mean([record["expert_load"] for record in last], axis=0)
        recycled_L, dropped_L = (
            np.mean([record[name] for record in last], axis=0) for name in ("recycled_share", "dropped_share")
        )
        columns = ((load_LE.max(1) * load_LE.shape[1]).tolist(), recycled_L.tolist(), dropped_L.tolist())
        return list(zip(*columns, strict=True))


def print_tables(
    console: Console, metrics: Metrics, heldout: HeldOut, stopped_at: int, seconds: Sequence[tuple[str, float]]
) -> None:
    """Print losses and bits per byte, routing per layer, and the time of each part."""
    first, last, validation = metrics.steps[0], metrics.steps[-1], metrics.validations[-1]
    table = Table("figure", "value", title="result", title_justify="left")
    table.add_row(f"loss, step {first['step']}", f"{first['loss']:.3f} nats/token")
    table.add_row(f"loss, step {last['step']}", f"{last['loss']:.3f} nats/token")
    table.add_row(
        "held-out loss", f"{validation['validation_loss']:.3f} nats/token over {heldout.target_tokens:,} tokens"
    )
    table.add_row("held-out bits per byte", f"[bold]{heldout.bits_per_byte(validation['validation_loss']):.3f}[/bold]")
    table.add_row("the same text, unigram model", f"{heldout.unigram_bits_per_byte:.3f} bits per byte")
    table.add_row("stopped and resumed", f"after step {stopped_at}")
    table.add_row("speed", f"{metrics.tokens_per_s:,.0f} tokens/s (median)")
    console.print(table)
    table = Table(
        "layer", "busiest expert / mean", "recycled", "dropped", title="routing at the end", title_justify="left"
    )
    for number, (load, recycled, dropped) in enumerate(metrics.layers()):
        table.add_row(str(number), f"{load:.2f}", f"{recycled:.1%}", f"{dropped:.1%}")
    console.print(table)
    table = Table("part", "seconds", title="time", title_justify="left")
    for name, elapsed in seconds:
        table.add_row(name, f"{elapsed:.0f}")
    table.add_row("[bold]all[/bold]", f"[bold]{sum(elapsed for _, elapsed in seconds):.0f}[/bold]")
    console.print(table)


def plot_losses(path: Path, metrics: Metrics, experiment: Experiment, heldout: HeldOut, stopped_at: int) -> None:
    """Plot training and validation loss by step as a PNG, with stage boundaries and the step of the stop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in metrics.steps], [r["loss"] for r in metrics.steps], label="training")
    axes.plot(
        [r["step"] for r in metrics.validations],
        [r["validation_loss"] for r in metrics.validations],
        "o-",
        label="held-out",
    )
    axes.axhline(
        heldout.unigram_nats / heldout.target_tokens, color="grey", linestyle=":", label="held-out, unigram model"
    )
    axes.axvline(stopped_at, color="tab:red", linestyle="--", linewidth=1, label="stopped and resumed")
    begin = 0
    for stage in experiment.stages:
        if begin:
            axes.axvline(begin, color="lightgrey", linewidth=1, zorder=0)
        axes.text(
            begin,
            1.0,
            f" {stage.name}",
            transform=axes.get_xaxis_transform(),
            va="bottom",
            fontsize="small",
            rotation=20,
        )
        begin += stage.num_steps
    axes.set(xlabel="step", ylabel="loss, nats per token", xlim=(0, begin))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
