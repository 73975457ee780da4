"""Tokenizing JSON lines: `hunyuan-data tokenize` against the loop of Megatron-LM's preprocessing tool, in one run.

    python tests/benchmarks/tokenizing.py CORPUS.jsonl [--rounds 3] [--sizes 20 100] [--ranks FILE] [--json FILE]

Megatron-LM's tools/preprocess_data.py is in no PyPI package. Its loop is reimplemented here from its published
structure, on core's own tokenizer and dataset builder: lines go through a pool's `imap` in chunks of 32, each worker
parses a line and encodes it with tiktoken, and the parent writes the lists of ids that come back. The loop omits the
tool's import of megatron.training, so the real tool starts even later. Both read the same lines with Hunyuan's split
pattern over the ranks of cl100k_base (from PyPI's litellm, or --ranks), and the ids are compared first.

Rates are computed between the two sizes (MB of input), so that start-up does not count; start-up is the time for one
short document. Memory is the maximum sum of the proportional set sizes of the process and its children, sampled five
times a second. Every command runs alone, all take turns, and medians over the rounds count.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LITELLM_RANKS = "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
CONTENDERS = {
    "ours, 1 worker": ("ours", 1),
    "ours, 2 workers": ("ours", 2),
    "Megatron, 1 worker": ("loop", 1),
    "Megatron, 2 workers": ("loop", 2),
}


class MegatronEncoder:
    """The work of a pool worker, as in the tool's encoder."""

    def __init__(self, vocabulary: str) -> None:
        self.vocabulary = vocabulary

    def start(self) -> None:
        """Create this worker's tokenizer."""
        from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer

        from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

        tiktoken_tokenizer._PATTERN_TIKTOKEN_V2 = SPLIT_PATTERN
        num_special = len(SPECIAL_TOKENS)
        vocab_size = len(json.loads(Path(self.vocabulary).read_bytes())) + num_special
        MegatronEncoder.tokenizer = tiktoken_tokenizer.TikTokenTokenizer(
            self.vocabulary, num_special_tokens=num_special, vocab_size=vocab_size
        )

    def encode(self, line: str) -> tuple[list[int], list[int]]:
        """(ids with the end of the document, lengths) of one line."""
        ids = MegatronEncoder.tokenizer.text_to_ids(json.loads(line)["text"])
        if ids:
            ids.append(MegatronEncoder.tokenizer.eod)
        return ids, [len(ids)]


def megatron_loop(source: str, output: str, vocabulary: str, workers: int) -> None:
    """Tokenize `source` into output.bin and output.idx."""
    warnings.simplefilter("ignore")  # core's warnings about packages that are not installed
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = MegatronEncoder(vocabulary)
    encoder.start()
    with open(source, encoding="utf-8") as lines:
        pool = multiprocessing.get_context("fork").Pool(workers, initializer=encoder.start)
        builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(encoder.tokenizer.vocab_size))
        for ids, lengths in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{output}.idx")
    pool.close()
    pool.join()


def write_vocabulary(ranks: Path, vocabulary: Path) -> np.ndarray:
    """The ranks in the format of Megatron's class; returns the rank of each of its tokens.

    The class wants the 256 bytes first, in their order; the tokens that are made of them merge as before.
    """
    tokens = [line.split() for line in ranks.read_text().splitlines()]
    tokens.sort(
        key=lambda token: (
            (content, 0) if len(content := base64.b64decode(token[0])) == 1 else (b"\xff\xff", int(token[1]))
        )
    )
    entries = [{"rank": place, "token_bytes": token, "token_str": ""} for place, (token, _) in enumerate(tokens)]
    vocabulary.write_text(json.dumps(entries))
    return np.array([int(rank) for _, rank in tokens])


def write_inputs(corpus: str, work: Path, sizes: list[float]) -> dict[float, str]:
    """Files of the requested sizes, in MB, from lines of the corpus in a seeded random order; each starts with the
    contents of the smaller ones."""
    places, place = [], 0
    with open(corpus, "rb") as lines:
        for line in lines:
            places.append((place, len(line)))
            place += len(line)
        if place < max(sizes) * 1e6:
            raise SystemExit(f"{corpus}: {place / 1e6:.0f} MB, too small for --sizes {max(sizes)}")
        random.Random(1).shuffle(places)
        paths = {}
        for size in sizes:
            paths[size], written = f"{work}/{size:g}.jsonl", 0
            with open(paths[size], "wb") as file:
                for start, length in places:
                    if written + length > size * 1e6:
                        continue
                    lines.seek(start)
                    file.write(lines.readline().rstrip(b"\n") + b"\n")
                    written += length
    return paths


def measured(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command, and the peak of its process tree in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            total = 0
            try:
                tree = psutil.Process(process.pid)
                for member in [tree, *tree.children(recursive=True)]:
                    total += member.memory_full_info().pss
            except psutil.Error:  # a process that is just ending
                continue
            peak[0] = max(peak[0], total / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has already reaped it
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": peak[0]}


def command_of(kind: str, workers: int, source: str, output: Path, tokenizer: Path, vocabulary: Path) -> list[str]:
    """The command line of a contender."""
    if kind == "ours":
        given = ["--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(workers)]
        return [sys.executable, "-m", "data_tools.cli", "tokenize", source, *given]
    return [sys.executable, __file__, "--loop", source, str(output), str(vocabulary), str(workers)]


def compare(source: str, ours: Path, theirs: Path, order: np.ndarray) -> str:
    """How many documents have the same ids in both outputs; a mismatch ends the benchmark.

    Skipped: texts that are not in NFC, to which only ours normalises, and texts that contain one of Megatron's special
    tokens, such as <s>, which its class encodes as that token.
    """
    from hunyuan_pretrain.data.indexed import TokenizedDataset
    from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS

    found = TokenizedDataset(ours)
    ids = np.fromfile(theirs.with_suffix(".bin"), dtype=np.int32)
    lengths = np.fromfile(theirs.with_suffix(".idx"), dtype=np.int32, offset=34, count=found.num_documents)
    ends = np.cumsum(lengths)
    assert ends[-1] == len(ids), "the two do not hold the same number of documents"
    compared = 0
    with open(source, encoding="utf-8") as lines:
        for number, (line, length, end) in enumerate(zip(lines, lengths, ends, strict=True)):
            body = ids[end - length : end - 1] - len(SPECIAL_TOKENS)
            if (body >= 0).all() and unicodedata.is_normalized("NFC", json.loads(line)["text"]):
                if not np.array_equal(found.document(number)[1:-1], order[body]):
                    raise SystemExit(f"{source}: document {number} has other ids")
                compared += 1
    return f"{compared:,} of {found.num_documents:,}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs=2, default=[20, 100])
    parser.add_argument("--ranks")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.ranks is None:
        package = importlib.util.find_spec("litellm")
        if package is None:
            raise SystemExit("no ranks of cl100k_base: pip install litellm, or give --ranks")
        options.ranks = str(Path(str(package.origin)).parent / LITELLM_RANKS)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, vocabulary = work / "tokenizer", work / "vocabulary.json"
        tokenizer.mkdir()
        shutil.copy(options.ranks, tokenizer / "hy.tiktoken")
        order = write_vocabulary(Path(options.ranks), vocabulary)
        inputs = write_inputs(options.corpus, work, options.sizes)
        inputs[0] = str(work / "short.jsonl")
        Path(inputs[0]).write_text('{"text": "one short document"}\n')
        runs: dict[str, dict[float, list[dict[str, float]]]] = {
            name: {size: [] for size in inputs} for name in CONTENDERS
        }
        for round_number in range(options.rounds):
            for size, source in inputs.items():
                for name, (kind, workers) in CONTENDERS.items():
                    output = work / f"out_{kind}"
                    shutil.rmtree(output, ignore_errors=True)
                    command = command_of(kind, workers, source, output, tokenizer, vocabulary)
                    runs[name][size].append(measured(command))
                if round_number == 0 and size == options.sizes[0]:
                    print(
                        f"same ids: {compare(source, work / 'out_ours', work / 'out_loop', order)} documents",
                        flush=True,
                    )
        report(runs, options.sizes, {size: os.path.getsize(path) / 1e6 for size, path in inputs.items()}, options.json)


def report(
    runs: dict[str, dict[float, list[dict[str, float]]]],
    sizes: list[float],
    megabytes: dict[float, float],
    file: str | None,
) -> None:
    """Print the table, and write it and its raw data as JSON."""
    small, large = sizes
    between = megabytes[large] - megabytes[small]
    rows: dict[str, Any] = {}
    print(f"\n{'':20} MB/s  MB/CPU s  wall of {small:g} MB  start-up  CPU of it  peak MB at {small:g}, {large:g}")
    for name, of_size in runs.items():
        medians = {
            size: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for size, found in of_size.items()
        }
        row = {
            "mb_per_s": between / (medians[large]["wall"] - medians[small]["wall"]),
            "mb_per_cpu_s": between / (medians[large]["cpu"] - medians[small]["cpu"]),
            "wall_small_s": medians[small]["wall"],
            "start_s": medians[0]["wall"],
            "start_cpu_s": medians[0]["cpu"],
            "peak_mb": [max(run["peak"] for run in of_size[size]) for size in sizes],
        }
        rows[name] = row
        peaks = ", ".join(f"{peak:,.0f}" for peak in row["peak_mb"])
        print(
            f"{name:20} {row['mb_per_s']:4.1f}  {row['mb_per_cpu_s']:8.1f}  {row['wall_small_s']:13.1f}  "
            f"{row['start_s']:8.2f}  "
            f"{row['start_cpu_s']:9.2f}  {peaks}"
        )
    ratio = rows["ours, 1 worker"]["mb_per_cpu_s"] / rows["Megatron, 1 worker"]["mb_per_cpu_s"]
    print(f"ours / Megatron, MB per CPU second, one worker: {ratio:.2f}")
    if file:
        Path(file).write_text(
            json.dumps(
                {"table": rows, "runs": {name: {str(k): v for k, v in found.items()} for name, found in runs.items()}}
            )
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        megatron_loop(*sys.argv[2:5], workers=int(sys.argv[5]))
    else:
        main()
