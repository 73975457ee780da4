"""`hunyuan-data mix`: shows what the stages of an experiment will read, before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hunyuan_pretrain.config.derived import data_parallel_size
from hunyuan_pretrain.config.extras import install_hint
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.balance import deal, imbalance, sequence_costs
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import new_folder, write_file
from hunyuan_pretrain.data.mixture import source_path
from hunyuan_pretrain.data.sample_order import SampleOrder
from hunyuan_pretrain.plan.counts import flops_per_token

REPORT, PICTURE = "mix.json", "mix.png"
_MEASURED_STEPS = 50
_PIECES_AT_A_TIME = 1 << 22


def mix(
    config: str, overrides: list[str], output: str | None, console: Console, *, overwrite: bool = False
) -> dict[str, Any]:
    """Print the mixture of every stage, and write it to the folder `output` together with a plot; returns the report.

    Raises DataFormatError if data is missing or cannot supply what the stages ask for, ConfigError for an invalid
    experiment.
    """
    experiment = load_experiment(Path(config), overrides)
    order = SampleOrder(experiment, None)
    stages = [describe_stage(experiment, order, number) for number in range(len(experiment.stages))]
    report = {"experiment": experiment.name, "seed": experiment.seed, "stages": stages}
    for stage in stages:
        _print_stage(stage, console)
    if output is not None:
        with new_folder(output, files=(REPORT, PICTURE), overwrite=overwrite) as folder:
            draw(stages, folder / PICTURE)
            write_file(folder / REPORT, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
        console.print(f"{output}: {REPORT} and {PICTURE}")
    return report


def describe_stage(experiment: Experiment, order: SampleOrder, number: int) -> dict[str, Any]:
    """Tokens and epochs per source, padding, cut documents, and the context that tokens see, for one stage.

    A partial epoch of a source counts in proportion, because its sequences are drawn at random. The document epochs are
    those of the documents that are read most often, over all sources that hold them.
    """
    stage, mixture = experiment.stages[number], order.mixture
    epochs, tokens = mixture.epochs(number), mixture.tokens(number)
    sources, bins, context_sum = [], np.zeros(1), 0.0
    padding = 0.0
    for source, count in mixture.counts[number].items():
        path = mixture.sources[source]
        dataset = order.datasets[path]
        share = count / len(dataset)
        reading = mixture.most_read(number, path)
        caps = [entry.max_epochs for entry in stage.data if entry.max_epochs and source_path(entry.path) == path]
        padding += share * (len(dataset) * dataset.sequence_length - dataset.index.num_tokens)
        of_source, sum_of_source = context_of(dataset.index.piece_length)
        size = max(len(bins), len(of_source))
        bins = np.pad(bins, (0, size - len(bins))) + share * np.pad(of_source, (0, size - len(of_source)))
        context_sum += share * sum_of_source
        sources.append(
            {
                "path": path,
                "sequences": count,
                "tokens": round(tokens[path]),
                "share": tokens[path] / sum(tokens.values()),
                "epochs_of_stage": share,
                "epochs_at_end": epochs[path],
                "document_epochs_at_end": reading.epochs if reading else 0.0,
                "document_read_at_most": reading.at_most if reading else 0,
                "documents_read_in": {pack: float(times) for pack, times in reading.by_pack.items()} if reading else {},
                "max_epochs": min(caps, default=None),
                "documents": dataset.index.packed_documents,
                "cut_documents": dataset.index.cut_documents,
            }
        )
    total = sum(tokens.values())
    ranks = experiment.parallel.world_size and data_parallel_size(experiment, experiment.parallel.world_size)
    return {
        "name": stage.name,
        "steps": stage.num_steps,
        "sequence_length": stage.sequence_length,
        "tokens": round(total),
        "padding": padding / (total + padding),
        "skipped_steps": stage.skip_data_steps,
        "sources": sources,
        "context": {
            "at_least": [0, *(2**power for power in range(len(bins) - 1))],
            "tokens": bins.tolist(),
            "mean": context_sum / total,
        },
        "balance": describe_balance(experiment, order, number, ranks) if ranks and ranks > 1 else None,
    }


def describe_balance(experiment: Experiment, order: SampleOrder, number: int, num_ranks: int) -> dict[str, Any]:
    """Step time with unequal attention work relative to equal work, averaged over up to 50 steps of the stage.

    Estimated from FLOPs, for data-parallel ranks that synchronise in every micro-batch, as they do with expert
    parallelism. Two values: for the batch in its original order, and as assigned by balance_attention=deal. With
    balance_attention=group the batches are already those of the groups.
    """
    stage = experiment.stages[number]
    flops = flops_per_token(experiment.model, stage.sequence_length)
    of_attention = (flops.attention_scores + flops.attention_values) / stage.sequence_length
    attention_cost_tokens = (flops.total - of_attention * stage.sequence_length) / of_attention
    first = order.schedule.first_steps[number]
    steps = np.unique(np.linspace(0, stage.num_steps - 1, _MEASURED_STEPS).astype(int))
    slowdowns: dict[str, list[float]] = {"as it stands": [], "dealt": []}
    for step in steps.tolist():
        costs = sequence_costs(order.costs(first + step), stage.sequence_length, attention_cost_tokens)
        plain = np.arange(len(costs)).reshape(-1, num_ranks, stage.micro_batch_sequences)
        for name, positions in (
            ("as it stands", plain),
            ("dealt", deal(costs, num_ranks, stage.micro_batch_sequences)),
        ):
            slowdowns[name].append(imbalance(costs[positions].sum(axis=2)).slowdown)
    return {
        "data_parallel_size": num_ranks,
        "balance_attention": stage.balance_attention,
        "attention_cost_tokens": attention_cost_tokens,
        "slowdown": {name: float(np.mean(found)) for name, found in slowdowns.items()},
    }


def context_of(piece_lengths: np.ndarray) -> tuple[np.ndarray, float]:
    """(tokens per context bin 0, 1, 2-3, 4-7, ..., sum of the context of all tokens) of pieces. The n-th token of a
    piece has a context of n - 1 tokens."""
    numbers = np.zeros(1, dtype=np.int64)
    for begin in range(0, len(piece_lengths), _PIECES_AT_A_TIME):  # there may be too many to sort, or to hold
        of_part = np.bincount(piece_lengths[begin : begin + _PIECES_AT_A_TIME])
        numbers = np.pad(numbers, (0, max(len(of_part) - len(numbers), 0)))
        numbers[: len(of_part)] += of_part
    lengths = np.flatnonzero(numbers)
    counts = numbers[lengths]
    longest = int(lengths.max(initial=1))
    lower = np.array([0, *(1 << power for power in range(longest.bit_length() + 1))])
    # tokens with a context of at least `lower`; the return value subtracts those of the next bin
    at_least = np.array([(np.maximum(lengths - low, 0) * counts).sum() for low in lower], dtype=np.float64)
    total = float((lengths.astype(np.float64) * (lengths - 1.0) / 2 * counts).sum())
    return (at_least - np.append(at_least[1:], 0))[: longest.bit_length() + 1], total


def _print_stage(stage: dict[str, Any], console: Console) -> None:
    title = (
        f"{stage['name']}: {stage['steps']:,} steps, {stage['sequence_length']:,} tokens per sequence, "
        f"{stage['tokens']:,} tokens"
    )
    table = Table(
        "source",
        "tokens",
        "share",
        "epochs",
        "at its end",
        "by documents",
        "documents cut",
        title=title,
        title_justify="left",
    )
    for source in stage["sources"]:
        allowed = f" of {source['max_epochs']:g}" if source["max_epochs"] else ""
        cut = source["cut_documents"] / source["documents"]
        table.add_row(
            source["path"],
            f"{source['tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs_of_stage']:.3g}",
            f"{source['epochs_at_end']:.3g}",
            f"{source['document_epochs_at_end']:.3g}{allowed} (one at most {source['document_read_at_most']})",
            f"{source['cut_documents']:,} ({cut:.2%})",
        )
    console.print(table)
    context = stage["context"]
    shares = []
    for threshold in (1024, 4096, 32768, 131072):
        seeing = sum(
            tokens for low, tokens in zip(context["at_least"], context["tokens"], strict=True) if low >= threshold
        )
        if threshold < stage["sequence_length"]:
            shares.append(f"{seeing / stage['tokens']:.1%} at least {threshold:,}")
    seen = "; ".join(
        [f"a token sees {context['mean']:,.0f} tokens of its document on average", *filter(None, [", ".join(shares)])]
    )
    console.print(f"padding {stage['padding']:.4%}; {seen}")
    if stage["balance"]:
        _print_balance(stage["balance"], console)
    console.print()


def _print_balance(balance: dict[str, Any], console: Console) -> None:
    slowdown = balance["slowdown"]
    console.print(
        f"{balance['data_parallel_size']} data-parallel ranks: unequal attention makes a step "
        f"{slowdown['as it stands'] - 1:.2%} longer with "
        f"the batches as they are, {slowdown['dealt'] - 1:.2%} when dealt by cost (balance_attention is "
        f"{balance['balance_attention']})"
    )


def draw(stages: list[dict[str, Any]], file: Path) -> None:
    """Plot tokens per source and the context that tokens see, one row per stage. Raises DataFormatError without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataFormatError(f"the plot needs matplotlib: {install_hint('matplotlib')}, or omit --output") from None
    figure = Figure(figsize=(12, 1 + 2.6 * len(stages)), layout="constrained")
    axes = figure.subplots(len(stages), 2, squeeze=False)
    for (left, right), stage in zip(axes, stages, strict=True):
        names = [Path(source["path"]).name for source in stage["sources"]]
        left.barh(names, [source["tokens"] for source in stage["sources"]])
        for position, source in enumerate(stage["sources"]):
            left.annotate(f" {source['share']:.1%}, {source['epochs_at_end']:.2g} epochs", (0, position), va="center")
        left.set_title(f"{stage['name']}: tokens by source")
        right.bar(
            [f"{low:,}" for low in stage["context"]["at_least"]],
            [tokens / stage["tokens"] for tokens in stage["context"]["tokens"]],
        )
        right.tick_params(axis="x", rotation=60, labelsize=7)
        right.set_title(
            f"share of tokens by context, mean {stage['context']['mean']:,.0f} of {stage['sequence_length']:,}"
        )
    figure.savefig(file)
