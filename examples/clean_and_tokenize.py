"""From raw JSON lines to tokens: datatrove's language and quality filters and its near-duplicate removal, then the
steps of `hunyuan-data tokenize`.

    python examples/clean_and_tokenize.py raw/ --tokenizer data/tokenizer --output data/tokens --work data/work

Copy this file and change it: the thresholds are datatrove's defaults, taken from the papers behind the filters, and
meant for English prose. Every stage writes its result to --work, and the same command resumes after the last finished
stage; after changing the filters, use another --work. docs/data_pipeline.md says what each stage needs.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.extras import missing_package

try:
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import WordTokenizer

    from data_tools.datatrove_pipeline import JoinShards, PlanTokenizing, TokenizeShards
    from data_tools.executors import EXECUTORS
except ModuleNotFoundError as error:
    raise SystemExit(missing_package(error)) if missing_package(error) else error from None


class PlainWords(WordTokenizer):
    """Splits words and punctuation with a regular expression, for use without spaCy; good enough for languages with
    spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits, and single punctuation marks."""
        return re.findall(r"\w+|[^\w\s]", text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Sentences, each ending with a full stop, question mark or exclamation mark."""
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each sentence."""
        return [match.span() for match in re.finditer(r"\S[^.!?]*[.!?]*", text)]


@dataclass
class Stage:
    """Steps that run together in the same tasks; each task takes its share of the files."""

    name: str
    steps: list[PipelineStep]
    tasks: int
    can_be_skipped: bool = True
    """Whether to trust datatrove's markers of finished tasks; the tokenizing steps check for themselves."""


def stages(options: argparse.Namespace) -> list[Stage]:
    """All stages, in order."""
    work, tasks, num_buckets = Path(options.work), options.tasks, MinhashConfig().num_buckets
    words = PlainWords() if options.words == "plain" else options.words

    def removed(name: str) -> JsonlWriter:
        return JsonlWriter(f"{work}/removed/{name}")

    filters: list[PipelineStep] = [
        GopherRepetitionFilter(language=words, exclusion_writer=removed("repetition")),
        GopherQualityFilter(language=words, exclusion_writer=removed("gopher")),
        FineWebQualityFilter(language=words, exclusion_writer=removed("fineweb")),
    ]
    if options.languages:
        filters.insert(0, LanguageFilter(options.languages, exclusion_writer=removed("language")))
    return [
        Stage("filter", [JsonlReader(options.input), *filters, JsonlWriter(f"{work}/filtered")], tasks),
        Stage(
            "signatures",
            [JsonlReader(f"{work}/filtered"), MinhashDedupSignature(f"{work}/signatures", language=words)],
            tasks,
        ),
        Stage("buckets", [MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets")], num_buckets),
        Stage("clusters", [MinhashDedupCluster(f"{work}/buckets", f"{work}/duplicates")], 1),
        Stage(
            "deduplicate",
            [
                JsonlReader(f"{work}/filtered"),  # as many tasks as for the signatures, so that each finds its own
                MinhashDedupFilter(f"{work}/duplicates", exclusion_writer=removed("duplicates")),
                JsonlWriter(f"{work}/clean", compression=None),  # plain lines can be cut into shards
            ],
            tasks,
        ),
        Stage("plan", [PlanTokenizing([f"{work}/clean"], options.tokenizer, options.output)], 1, can_be_skipped=False),
        Stage("tokenize", [TokenizeShards(options.output)], tasks, can_be_skipped=False),
        Stage("join", [JoinShards(options.output)], 1, can_be_skipped=False),
    ]


def run(options: argparse.Namespace) -> None:
    """Submit all stages to Slurm, or run one after the other."""
    of_executor: dict[str, Any] = {"workers": options.workers} if options.executor != "slurm" else {}
    if options.executor == "slurm":
        of_executor = {
            "partition": options.partition,
            "time": options.time,
            "qos": None,
            "sbatch_args": {"kill-on-invalid-dep": "yes"},
        }
    if options.executor == "ray":
        import ray

        ray.init()
    last = None
    for stage in stages(options):
        logs = f"{options.work}/logs/{stage.name}"
        if options.executor == "slurm":
            of_executor |= {"job_name": f"hunyuan-{stage.name}", "depends": last}
        executor = EXECUTORS[options.executor](
            stage.steps, tasks=stage.tasks, logging_dir=logs, skip_completed=stage.can_be_skipped, **of_executor
        )
        executor.run()
        # Ray's executor does not report a failed task
        if options.executor != "slurm" and executor.get_incomplete_ranks(skip_completed=True):
            raise SystemExit(f"{stage.name}: not finished; {logs}/logs says why, and the same command resumes")
        last = executor


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "input", help="folder of .jsonl files, compressed or not, with a field `text`; one task reads whole files"
    )
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--output", required=True, help="folder to write the tokens to")
    parser.add_argument("--work", required=True, help="folder for intermediate results and logs")
    parser.add_argument(
        "--languages", nargs="*", default=[], help="languages to keep, such as en; downloads fastText's lid.176.bin"
    )
    parser.add_argument(
        "--words", default="eng", help="language whose words spaCy finds, such as eng or zho, or `plain` without spaCy"
    )
    parser.add_argument("--executor", choices=EXECUTORS, default="local")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="tasks at a time, for local and ray; -1: all")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--time", default="24:00:00", help="time limit of a Slurm task")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
