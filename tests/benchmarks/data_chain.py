"""The data chain on a corpus: text -> tokenizer -> shards -> packs of 4K, 32K and 256K -> mixtures of the published
phases.

    python tests/benchmarks/data_chain.py CORPUS.jsonl WORK [--base cl100k_base.tiktoken] [--vocab-size 32768]
    [--sample-fraction 0.25]

Runs the commands that a user runs, each as a separate process. Prints seconds, processor seconds, peak memory of the
largest process and bytes written for each, then what each phase will read. WORK must be empty. Documents of at least an
eighth of the sequence are "long".
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LENGTHS = (4096, 32768, 262144)
LONG_SHARE = 8
"""A document is long for a sequence if it fills at least one part in this many of it."""


def run(name: str, *arguments: object) -> None:
    """Run `hunyuan-data ...` and print what it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "data_tools.cli", *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: exit status {os.waitstatus_to_exitcode(status)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"| {name} | {time.perf_counter() - started:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1024:,.0f} |", flush=True)


def size_of(folder: Path) -> float:
    """Megabytes in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def phases(work: Path, vocab_size: int, tokens: int) -> dict:
    """An experiment with the phases of Hunyuan-Large's report, scaled to the corpus: 90% of its tokens come before the
    long-context phases."""

    def stage(
        name: str, share: float, length: int, batch: int, lr_end: float, data: list[dict], alpha: float = 1.0
    ) -> dict:
        size = max(int(share * tokens), length * batch)
        fields = {"sequence_length": length, "global_batch_sequences": batch, "lr_end": lr_end, "rope_alpha": alpha}
        return {"name": name, "tokens": size, **fields, "data": data}

    short = [{"path": str(work / "packed_4096"), "max_epochs": 1}]

    def mixed(length: int) -> list[dict]:
        return [
            {"path": str(work / f"packed_{length}_long"), "weight": 0.25, "max_epochs": 4},
            {"path": str(work / f"packed_{length}_normal"), "weight": 0.75, "max_epochs": 1},
        ]

    return {
        "base": str(ROOT / "configs/model/hunyuan_tiny.yaml"),
        "name": "phases",
        "run_dir": str(work / "run"),
        "tokenizer": str(work / "tokenizer"),
        "model": {"padded_vocab_size": vocab_size},
        "parallel": {"world_size": 8},
        "optimizer": {"lr": 1e-3},
        "stages": [
            stage("warmup", 0.01, 4096, 64, 1.0, short),
            stage("decay", 0.845, 4096, 64, 0.3, short),
            stage("anneal", 0.045, 4096, 64, 0.1, short),
            stage("long_32k", 0.1, 32768, 8, 0.1, mixed(32768)),
            stage("long_256k", 0.1, 262144, 8, 0.1, mixed(262144), 1e5),
        ],
    }


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("work", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--sample-fraction", type=float, default=0.25)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        sys.exit(f"{work}: not empty; give another folder")
    print("| | s | CPU s | MiB |\n|---|---|---|---|", flush=True)
    base = ["--base", options.base, "--base-size", 100_000] if options.base else []
    training = ["--vocab-size", options.vocab_size, "--sample-fraction", options.sample_fraction, *base]
    run("train-tokenizer", "train-tokenizer", options.corpus, *training, "--output", work / "tokenizer")
    tokens = work / "tokens"
    run("tokenize", "tokenize", options.corpus, "--tokenizer", work / "tokenizer", "--output", tokens)
    run("pack 4,096", "pack", tokens, "--sequence-length", 4096, "--output", work / "packed_4096")
    for length in LENGTHS[1:]:
        for kind, option, limit in (
            ("long", "--min-document-tokens", length // LONG_SHARE),
            ("normal", "--max-document-tokens", length // LONG_SHARE - 1),
        ):
            output = work / f"packed_{length}_{kind}"
            run(
                f"pack {length:,}, {kind}",
                "pack",
                tokens,
                "--sequence-length",
                length,
                option,
                limit,
                "--output",
                output,
            )
    manifest = yaml.safe_load((tokens / "manifest.json").read_text())
    (work / "phases.yaml").write_text(yaml.safe_dump(phases(work, options.vocab_size, manifest["tokens"])))
    run("mix", "mix", work / "phases.yaml", "--output", work / "mix")
    run("verify", "verify", work / "phases.yaml")
    print(f"{manifest['bytes'] / 1e6:,.0f} MB of text, {manifest['tokens']:,} tokens; MB written:")
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        print(f"  {folder.name}: {size_of(folder):,.1f}")


if __name__ == "__main__":
    main()
