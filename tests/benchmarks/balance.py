"""How much longer a training step takes because ranks wait for each other, in a model of the step, with and without
balancing.

    python tests/benchmarks/balance.py LENGTHS.npy [--kinds KINDS.npy] [--config configs/model/hunyuan_large.yaml]

LENGTHS.npy holds the tokens of each document of a corpus. The documents are packed to 32K and to 256K. Steps of 256
sequences, one per micro-batch, are drawn for 8 and 64 data-parallel ranks, from epochs of complete steps. A sequence
costs its FLOPs (plan.counts), as if a FLOP of attention took as long as any other.

- `micro-batch`: sum over micro-batches of the slowest rank / of the mean rank: the slowdown if ranks synchronise in
  every micro-batch, as they do if experts are spread over all of them.
- `step`: slowest / mean rank over a whole step: the slowdown if ranks synchronise only at its end. Both are means over
  the steps.
- `noise`: what balanced groups cost in randomness: the variance between steps of the mean cost of the step's sequences
  and, with KINDS.npy (a kind for each document, such as its language), of the token share of the commonest kind, as a
  multiple of the variance in random order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hunyuan_pretrain.config.load import load_model  # noqa: E402
from hunyuan_pretrain.config.schema import ModelConfig  # noqa: E402
from hunyuan_pretrain.data.balance import balanced_rows, cost_order, deal, imbalance, sequence_costs, squared_lengths  # noqa: E402
from hunyuan_pretrain.data.packing import Packing, pack_documents  # noqa: E402
from hunyuan_pretrain.data.permutation import mixed_key, permuted  # noqa: E402
from hunyuan_pretrain.plan.counts import flops_per_token  # noqa: E402

BATCH, STEPS = 256, 200
Walk = Callable[[np.ndarray, int], np.ndarray]


def attention_cost_tokens(model: ModelConfig) -> float:
    """Length of a document whose attention costs as much as everything else; attention FLOPs are proportional to it."""
    flops = flops_per_token(model, 10**6)
    return 10**6 * flops.matmuls / (flops.attention_scores + flops.attention_values)


def steps_of(num_sequences: int, walk: Walk) -> np.ndarray:
    """Rows of each step: (STEPS, BATCH), epoch after epoch, dropping incomplete steps."""
    per_epoch = num_sequences // BATCH
    position = np.arange(per_epoch * BATCH)
    epochs = [walk(position, mixed_key(1, epoch)).reshape(-1, BATCH) for epoch in range(-(-STEPS // per_epoch))]
    return np.concatenate(epochs)[:STEPS]


def share_of_commonest_kind(packing: Packing, kinds: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Share of the commonest kind among each sequence's tokens."""
    names, numbers = np.unique(kinds, return_inverse=True)
    commonest = np.bincount(numbers, weights=lengths, minlength=len(names)).argmax()
    tokens = packing.piece_length * (numbers[packing.piece_document] == commonest)
    return np.add.reduceat(tokens, packing.sequence_offsets[:-1]) / packing.sequence_length


def compare(costs: np.ndarray, order: np.ndarray, ranks: int, kind: np.ndarray | None) -> None:
    """Print a line for each way to order and assign sequences of these costs; `kind` is one kind's share of each
    sequence's tokens."""

    def random(position: np.ndarray, key: int) -> np.ndarray:
        return permuted(position, len(costs), key)

    def balanced(position: np.ndarray, key: int) -> np.ndarray:
        return balanced_rows(position, order, ranks, key)

    walks: list[tuple[str, Walk, bool]] = [
        ("random", random, False),
        ("random, dealt", random, True),
        ("balanced groups", balanced, False),
        ("balanced groups, dealt", balanced, True),
    ]
    attributes = [costs] if kind is None else [costs, kind]
    in_random_order = [values[steps_of(len(costs), random)].mean(axis=1).var() for values in attributes]
    for name, walk, is_dealt in walks:
        steps = steps_of(len(costs), walk)
        found = [
            imbalance((c[deal(c, ranks, 1)] if is_dealt else c.reshape(-1, ranks, 1)).sum(axis=2)) for c in costs[steps]
        ]
        noise = [
            values[steps].mean(axis=1).var() / one for values, one in zip(attributes, in_random_order, strict=True)
        ]
        slow, at_end = np.mean([each.slowdown for each in found]), np.mean([each.step for each in found])
        print(
            f"{ranks:7}  {name:24} {slow:11.3f} {at_end:7.3f}   " + " ".join(f"{value:9.1f}" for value in noise),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths")
    parser.add_argument("--kinds")
    parser.add_argument("--config", default=str(ROOT / "configs/model/hunyuan_large.yaml"))
    arguments = parser.parse_args()
    lengths = np.load(arguments.lengths)
    balance_point = attention_cost_tokens(load_model(arguments.config))
    print(
        f"{len(lengths):,} documents, {lengths.sum(dtype=np.int64):,} tokens; attention costs as much as all "
        f"else at {balance_point:,.0f}"
    )
    for sequence_length in (32768, 262144):
        packing = pack_documents(lengths, sequence_length, 0)
        squares = squared_lengths(packing)
        costs = sequence_costs(squares, sequence_length, balance_point)
        quantiles = np.quantile(costs / sequence_length - 1, [0, 0.5, 0.9, 1]).round(3)
        print(
            f"{len(costs):,} sequences of {sequence_length:,}; attention / all else: least, median, 90%, most "
            f"{quantiles.tolist()}"
        )
        print(f"{'ranks':>7}  {'order':24} {'micro-batch':>11} {'step':>7}   noise of cost, of kind")
        kind = share_of_commonest_kind(packing, np.load(arguments.kinds), lengths) if arguments.kinds else None
        for ranks in (8, 64):
            compare(costs, cost_order(squares), ranks, kind)


if __name__ == "__main__":
    main()
