"""Packing compared with its peers in one run: time, bins, documents cut, padding and memory, on the same lengths.

    python tests/benchmarks/packing.py [LENGTHS.npy ...] [--documents 1e5 1e6 1e7] [--sequence-lengths 4096 32768
    262144] [--rounds 3]

LENGTHS.npy holds the tokens of each document of a real corpus; --documents adds synthetic ones, log-normal with median
545 and mean 1,450. Each contender runs several times in a separate process; the least processor time of all threads
counts. A peer that is not installed is reported as absent. What the time covers:

- ours: from the lengths to the arrays of a dataset (which piece of which document is where), cutting and shuffling
  included;
- ours, bins alone: the content of lightbinpack's lists, as arrays, from the lengths of the pieces: nothing is cut or
  shuffled, and no dataset is made;
- lightbinpack: its fastest single-threaded best-fit decreasing, `obfd`, from a list of piece lengths to lists of
  pieces; then also with conversion of those lists to the same arrays;
- TRL: its real `pack_dataset`, over the whole dataset at once, on documents of one-byte tokens: once only the loop that
  fills bins, once all of it, which also copies the tokens. `bfd` discards what does not fit; `bfd_split` does the same
  job as ours;
- megatron-core: its `build_sample_idx`, which concatenates and cuts, including the shuffle of the documents before it.

Padding is measured over the whole result. "cut" counts documents that are not in one piece, or that lost a part.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

Report = dict[str, Any]
# More would take minutes, and several times as many bytes as there are tokens.
MOST_DOCUMENTS = {"TRL bfd": 2 * 10**5, "TRL bfd_split": 2 * 10**5}


def ours(lengths: np.ndarray, sequence_length: int, method: str = "best_fit") -> Callable[[], Report]:
    from hunyuan_pretrain.data.packing import pack_documents

    def run() -> Report:
        packing = pack_documents(lengths, sequence_length, 0, method)  # type: ignore[arg-type]
        return {
            "bins": packing.num_sequences,
            "cut": packing.cut_documents,
            "tokens": int(packing.piece_length.sum(dtype=np.int64)),
        }

    return run


def bins_alone(lengths: np.ndarray, sequence_length: int) -> Callable[[], Report]:
    from hunyuan_pretrain.data.best_fit import best_fit_decreasing

    pieces = (lengths % sequence_length).astype(np.uint64)
    pieces = pieces[pieces > 0]
    item = np.arange(len(pieces), dtype=np.uint64)
    whole = int((lengths // sequence_length).sum(dtype=np.int64))

    def run() -> Report:
        by_length = ((np.uint64(sequence_length) - pieces) << np.uint64(32)) | item
        by_length.sort()
        counts = np.bincount(pieces.astype(np.int64), minlength=sequence_length)
        sizes = np.flatnonzero(counts)[::-1]
        fit = best_fit_decreasing(sizes, counts[sizes], sequence_length)
        by_bin = by_length & np.uint64(2**32 - 1)
        for begin, bins in fit.parts(2**18):
            by_bin[begin : begin + len(bins)] |= bins.astype(np.uint64) << np.uint64(32)
        by_bin.sort()
        offsets = np.searchsorted(by_bin, np.arange(fit.num_bins + 1, dtype=np.uint64) << np.uint64(32))
        assert offsets[-1] == len(by_bin.astype(np.uint32))
        cut = int(np.count_nonzero(lengths > sequence_length))
        return {"bins": fit.num_bins + whole, "cut": cut, "tokens": int(lengths.sum(dtype=np.int64))}

    return run


def lightbinpack(lengths: np.ndarray, sequence_length: int, to_arrays: bool = False) -> Callable[[], Report]:
    """Whole sequences from long documents need no packing and are not passed to it."""
    from lightbinpack import obfd

    pieces = lengths % sequence_length
    documents = np.flatnonzero(pieces)
    pieces_list = pieces[documents].tolist()
    whole = int((lengths // sequence_length).sum(dtype=np.int64))

    def run() -> Report:
        bins = obfd(pieces_list, sequence_length)
        if to_arrays:
            offsets = np.cumsum([0, *map(len, bins)])
            item = np.fromiter((item for members in bins for item in members), np.int64, len(pieces_list))
            arrays = documents[item].astype(np.uint32), pieces[documents[item]], offsets
            assert len(arrays[0]) == offsets[-1]
        cut = int(np.count_nonzero(lengths > sequence_length))
        return {"bins": len(bins) + whole, "cut": cut, "tokens": int(lengths.sum(dtype=np.int64))}

    return run


def trl(lengths: np.ndarray, sequence_length: int, strategy: str) -> Callable[[], Report]:
    """The loop is timed in the real run: from the segment tree's creation to the first `take` after it."""
    import datasets
    import pyarrow as pa
    from trl import data_utils, pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    column = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int8))
    dataset = datasets.Dataset(pa.table({"input_ids": column}))
    started: list[float] = []
    ended: list[float] = []

    class TimedTree(data_utils._SegmentTree):
        def __init__(self, maxval: int) -> None:
            started.append(time.process_time())
            super().__init__(maxval)

    class TimedCompute:
        def __getattr__(self, name: str) -> Any:
            if name == "take":
                ended.append(time.process_time())
            return getattr(compute, name)

    compute = data_utils.pc
    data_utils._SegmentTree, data_utils.pc = TimedTree, TimedCompute()

    def run() -> Report:
        packed = pack_dataset(
            dataset, sequence_length, strategy, map_kwargs={"batch_size": None, "writer_batch_size": 1000}
        )
        cut = int(np.count_nonzero(lengths > sequence_length))
        tokens = sum(int(chunk.flatten().to_numpy().sum()) for chunk in packed.data["seq_lengths"].chunks)
        return {"bins": len(packed), "cut": cut, "tokens": tokens, "loop_s": ended[-1] - started[-1]}

    return run


def megatron(lengths: np.ndarray, sequence_length: int) -> Callable[[], Report]:
    """As GPTDataset does for one epoch: a sequence shares its last token with the next, and the last, short one is
    dropped."""
    from megatron.core.datasets import helpers

    total = int(lengths.sum(dtype=np.int64))

    def run() -> Report:
        documents = np.arange(len(lengths), dtype=np.int32)
        np.random.RandomState(0).shuffle(documents)
        index = helpers.build_sample_idx(lengths, documents, sequence_length, 1, total, True, 1)
        cut_at = np.flatnonzero(index[:-1, 1])
        return {
            "bins": len(index) - 1,
            "cut": len(np.unique(index[cut_at, 0])),
            "tokens": (len(index) - 1) * sequence_length,
        }

    return run


CONTENDERS: dict[str, Callable[[np.ndarray, int], Callable[[], Report]]] = {
    "ours, best_fit": ours,
    "ours, bins alone": bins_alone,
    "lightbinpack obfd": lightbinpack,
    "lightbinpack obfd, to arrays": lambda lengths, size: lightbinpack(lengths, size, to_arrays=True),
    "TRL bfd": lambda lengths, size: trl(lengths, size, "bfd"),
    "TRL bfd_split": lambda lengths, size: trl(lengths, size, "bfd_split"),
    "ours, chop": lambda lengths, size: ours(lengths, size, "chop"),
    "megatron-core chop": megatron,
}


def sample_lengths(source: str) -> np.ndarray:
    """Lengths from a file, or this many synthetic ones."""
    if source.endswith(".npy"):
        return np.ascontiguousarray(np.load(source), dtype=np.int32)
    return np.maximum(3, np.random.default_rng(0).lognormal(6.3, 1.4, int(float(source)))).astype(np.int32)


def worker(name: str, source: str, sequence_length: int, rounds: int) -> Report:
    """The contender's figures in this process; seconds are those of the fastest round."""
    lengths = sample_lengths(source)
    try:
        run = CONTENDERS[name](lengths, sequence_length)
    except ImportError as error:
        return {"absent": str(error)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report: Report = {}
    for _ in range(rounds):
        start = time.process_time()
        found = run()
        seconds = {"s": time.process_time() - start, "loop_s": found.pop("loop_s", None)}
        if not report or seconds["s"] < report["s"]:
            report = found | seconds
    return report | {"over_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10}


def measure(source: str, sequence_length: int, rounds: int, only: list[str]) -> None:
    lengths = sample_lengths(source)
    total = int(lengths.sum(dtype=np.int64))
    optimum = -(-total // sequence_length)
    print(
        f"\n{source}: {len(lengths):,} documents, {total:,} tokens, sequences of {sequence_length:,}, at least "
        f"{optimum:,} bins"
    )
    print(
        f"{'':30} {'seconds':>9} {'ours x':>8} {'bins':>10} {'/ optimum':>9} {'cut %':>7} {'padding %':>9} "
        f"{'kept %':>7} {'MiB':>7}"
    )
    ours_s: float | None = None
    for name in only:
        if len(lengths) > MOST_DOCUMENTS.get(name, len(lengths)):
            print(f"{name:30} not run on more than {MOST_DOCUMENTS[name]:,} documents")
            continue
        command = [
            sys.executable,
            __file__,
            source,
            "--worker",
            name,
            "--rounds",
            str(rounds),
            "--sequence-lengths",
            str(sequence_length),
        ]
        process = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
        if process.returncode:
            print(
                f"{name:30} failed: "
                f"{process.stderr.strip().splitlines()[-1] if process.stderr.strip() else process.returncode}"
            )
            continue
        report = json.loads(process.stdout.splitlines()[-1])
        if "absent" in report:
            print(f"{name:30} absent: {report['absent']}")
            continue
        ours_s = ours_s or report["s"]
        padding = 100 * (1 - report["tokens"] / (report["bins"] * sequence_length))
        print(
            f"{name:30} {report['s']:9.3f} {report['s'] / ours_s:8.1f} {report['bins']:10,} "
            f"{report['bins'] / optimum:9.5f} "
            f"{100 * report['cut'] / len(lengths):7.2f} {padding:9.3f} {100 * report['tokens'] / total:7.2f} "
            f"{report['over_mib']:7,.0f}"
        )
        if report["loop_s"] is not None:
            print(
                f"{'  its loop over bins alone':30} {report['loop_s']:9.3f} {report['loop_s'] / ours_s:8.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="*")
    parser.add_argument("--documents", nargs="*", default=["1e5", "1e6", "1e7"])
    parser.add_argument("--sequence-lengths", nargs="+", type=int, default=[4096, 32768, 262144])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS), help="ratios are to the first one"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(
            json.dumps(worker(arguments.worker, arguments.lengths[0], arguments.sequence_lengths[0], arguments.rounds))
        )
        return
    for source in [*arguments.lengths, *arguments.documents]:
        for sequence_length in arguments.sequence_lengths:
            measure(source, sequence_length, arguments.rounds, arguments.only)


if __name__ == "__main__":
    main()
