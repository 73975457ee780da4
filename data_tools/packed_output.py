"""Packs tokenized folders into a packed dataset, group by group. After a kill, the next run resumes with the groups
that have no report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.progress import ProgressReport
from hunyuan_pretrain.data.conversations import Overlong, fitted
from hunyuan_pretrain.data.digests import digest_of
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, finish_folder, read_manifest, unfinished_folder, write_manifest
from hunyuan_pretrain.data.indexed import TokenizedDataset, lengths_of
from hunyuan_pretrain.data.packed_format import (
    MAX_SEQUENCE_LENGTH,
    PACKED_FILES,
    PACKED_FORMAT,
    PACKED_VERSION,
    check_sources,
    packed_manifest,
)
from hunyuan_pretrain.data.packed_groups import (
    GroupReport,
    join_groups,
    read_report,
    remove_group,
    report_file,
    seed_of_group,
    split_into_groups,
    write_group,
)
from hunyuan_pretrain.data.packing import PackingMethod, check_options, pack_documents

GROUP_TOKENS = 100_000_000_000


@dataclass(frozen=True)
class PackJob:
    """What to pack, and how. Everything that the bytes of the result depend on, and nothing else."""

    tokenized: list[str]
    """Tokenized folders, absolute."""
    corpora: list[str]
    """Their digests."""
    sequence_length: int
    seed: int
    method: PackingMethod
    min_fragment_tokens: int
    min_document_tokens: int
    max_document_tokens: int | None
    materialize: bool
    overlong: Overlong | None
    """What happens to conversations longer than a sequence; None: the folders hold texts."""
    first_shards: list[int]
    """Of each group, over the shards of all folders."""

    @property
    def identity(self) -> str:
        """Equal for two jobs whose groups may be joined."""
        return digest_of(asdict(self))

    @property
    def num_groups(self) -> int:
        """Groups, each packed on its own."""
        return len(self.first_shards)

    def open(self) -> OpenJob:
        """Open the folders. Raises DataFormatError if one was tokenized again."""
        sources = [TokenizedDataset(folder, check_shards=False) for folder in self.tokenized]
        for source, digest in zip(sources, self.corpora, strict=True):
            if source.digest != digest:
                raise DataFormatError(f"{source.folder}: was tokenized again while it was packed; pack again")
        return OpenJob(self, sources)


def plan_pack(
    tokenized: Sequence[str],
    sequence_length: int,
    *,
    seed: int,
    method: PackingMethod = "best_fit",
    min_fragment_tokens: int = 1,
    min_document_tokens: int = 1,
    max_document_tokens: int | None = None,
    materialize: bool = False,
    group_tokens: int = GROUP_TOKENS,
    overlong: Overlong | None = None,
) -> PackJob:
    """Check the options and divide the folders into groups of at most `group_tokens` tokens, as `split_into_groups`.

    `overlong`: for conversations; None is "error" for them. Raises DataFormatError for an invalid option, if two
    folders were tokenized differently, or if `materialize` is given for several groups.
    """
    if sequence_length < 2:
        raise DataFormatError(f"--sequence-length {sequence_length}: must be at least 2, for a token and its label")
    if sequence_length > MAX_SEQUENCE_LENGTH:
        raise DataFormatError(f"--sequence-length {sequence_length}: must be at most {MAX_SEQUENCE_LENGTH}")
    if max_document_tokens is not None and max_document_tokens < min_document_tokens:
        raise DataFormatError(
            f"--max-document-tokens {max_document_tokens}: less than --min-document-tokens {min_document_tokens}"
        )
    check_options(sequence_length, method, min_fragment_tokens)
    sources = [TokenizedDataset(folder, check_shards=False) for folder in tokenized]
    check_sources(sources)
    is_chat = sources[0].chat is not None
    if overlong is not None and not is_chat:
        raise DataFormatError("--overlong: has no effect on texts, which are cut; tokenize conversations with --chat")
    if is_chat and method != "best_fit":
        raise DataFormatError(f"--method {method}: would cut conversations; leave it out")
    if overlong == "cut_turns" and sources[0].is_pairs:
        raise DataFormatError(
            "--overlong cut_turns: a pair has two last answers, which are compared; choose error or drop"
        )
    first_shards = split_into_groups([shard for source in sources for shard in source.shards], group_tokens)
    if materialize and len(first_shards) > 1:
        raise DataFormatError(
            f"--materialize: copies the tokens of one group, but --group-tokens {group_tokens} makes "
            f"{len(first_shards)}; give --group-tokens {sum(source.num_tokens for source in sources)}, or pack parts "
            "of the folders, each as a separate source"
        )
    return PackJob(
        tokenized=[str(source.folder.resolve()) for source in sources],
        corpora=[source.digest for source in sources],
        sequence_length=sequence_length,
        seed=seed,
        method=method,
        min_fragment_tokens=min_fragment_tokens,
        min_document_tokens=min_document_tokens,
        max_document_tokens=max_document_tokens,
        materialize=materialize,
        overlong=(overlong or "error") if is_chat else None,
        first_shards=first_shards,
    )


@dataclass(frozen=True)
class OpenJob:
    """A job with its tokenized folders."""

    job: PackJob
    sources: list[TokenizedDataset]

    @cached_property
    def tokens_of_groups(self) -> list[int]:
        """(groups,) tokens of all documents."""
        shards, first = [shard for source in self.sources for shard in source.shards], self.job.first_shards
        ends = [*first[1:], len(shards)]
        return [sum(shard.num_tokens for shard in shards[a:b]) for a, b in zip(first, ends, strict=True)]

    def write_group(self, folder: Path, number: int, advance: Callable[[int], None] = lambda tokens: None) -> None:
        """Pack a group into the unfinished folder. `advance` is called with the numbers of tokens that are done.

        Leaves nothing of the group if it raises. Raises DataFormatError if a shard is damaged.
        """
        job, shards = self.job, [shard for source in self.sources for shard in source.shards]
        shards = shards[job.first_shards[number] : [*job.first_shards[1:], len(shards)][number]]
        try:
            for shard in shards:
                shard.check()
                shard.check_index()
            lengths = lengths_of(shards)
            is_wanted = lengths >= job.min_document_tokens
            if job.max_document_tokens is not None:
                is_wanted &= lengths <= job.max_document_tokens
            wanted, of_chats = np.where(is_wanted, lengths, 0), None  # empty documents are not packed
            if job.overlong is not None:
                is_pairs = self.sources[0].is_pairs
                wanted, of_chats = fitted(shards, wanted, job.sequence_length, job.overlong, is_pairs)
            packing = pack_documents(
                wanted,
                job.sequence_length,
                seed_of_group(job.seed, number),
                job.method,
                job.min_fragment_tokens,
            )
            left_out = len(lengths) - int(np.count_nonzero(is_wanted))
            copied_from = shards if job.materialize else None
            write_group(folder, number, packing, lengths, left_out, copied_from, advance, of_chats)
        except BaseException:
            remove_group(folder, number)
            raise
        if not job.materialize:
            advance(self.tokens_of_groups[number])

    def finish(self, folder: Path) -> dict[str, Any]:
        """Join the finished groups in the unfinished folder; returns the manifest.

        Raises DataFormatError if no document was packed, which removes the groups, because the same job would fail
        again.
        """
        job = self.job
        reports = [read_report(folder, number) for number in range(job.num_groups)]
        if not sum(report.sequences for report in reports):
            for number in range(job.num_groups):
                remove_group(folder, number)
            if sum(report.overlong_dropped for report in reports):
                raise DataFormatError(
                    f"{', '.join(job.tokenized)}: every conversation is longer than --sequence-length "
                    f"{job.sequence_length}, so none is left; pack to longer sequences"
                )
            raise DataFormatError(
                f"{', '.join(job.tokenized)}: no document has {job.min_document_tokens} "
                f"{f'to {job.max_document_tokens}' if job.max_document_tokens else 'or more'} tokens; they have "
                f"{min(report.shortest for report in reports)} to {max(report.longest for report in reports)}"
            )
        digests = join_groups(folder, reports)
        manifest = packed_manifest(folder, self.sources, _entries(job, reports), digests)
        write_manifest(folder, manifest)
        return manifest


def pack(
    tokenized: Sequence[str], sequence_length: int, output: str, *, overwrite: bool = False, **planning: Any
) -> dict[str, Any]:
    """Pack the documents of tokenized folders into sequences of `sequence_length` tokens; returns the manifest.

    `planning` are arguments of `plan_pack`. Documents shorter than `min_document_tokens` or longer than
    `max_document_tokens` are left out, so that long documents can be packed separately and mixed by weight.
    `materialize` copies the tokens, so that each sequence is one contiguous read. The same folders and options give
    identical bytes, whatever the interruptions. Raises DataFormatError for an invalid option, if a folder is damaged,
    if two were tokenized differently, or if no document is left to pack. Finished groups then stay, and the same call
    does not pack them again; without a finished group, no output is left.
    """
    job = plan_pack(tokenized, sequence_length, **planning)
    with unfinished_folder(output, files=PACKED_FILES, identity=job.identity, overwrite=overwrite) as folder:
        if not (folder / MANIFEST).is_file():
            opened = job.open()
            waiting = unfinished_groups(job, folder)
            total = sum(opened.tokens_of_groups[number] for number in waiting)
            with ProgressReport("packing", total) as progress:
                for count, number in enumerate(waiting, start=1):
                    note = f"{count:,} of {len(waiting):,} groups"
                    opened.write_group(folder, number, partial(progress.advance, note=note))
            opened.finish(folder)
        name_output(output, folder, job.num_groups)
        return read_manifest(output, PACKED_FORMAT, PACKED_VERSION, "hunyuan-data pack")


def unfinished_groups(job: PackJob, folder: Path) -> list[int]:
    """The groups without a report."""
    return [number for number in range(job.num_groups) if not report_file(folder, number).is_file()]


def name_output(output: str, folder: Path, num_groups: int) -> None:
    """Give the joined folder its final name, without the reports of its groups."""
    for number in range(num_groups):
        report_file(folder, number).unlink(missing_ok=True)
    finish_folder(output)


def _entries(job: PackJob, reports: Sequence[GroupReport]) -> dict[str, Any]:
    """The manifest's entries about how the folder was packed and what it holds."""

    def total(name: str) -> int:
        return sum(getattr(report, name) for report in reports)

    groups = [
        {"documents": report.documents, "sequences": report.sequences, "pieces": report.pieces} for report in reports
    ]
    return {
        "sequence_length": job.sequence_length,
        "sequences": total("sequences"),
        "pieces": total("pieces"),
        "most_pieces": max(report.most_pieces for report in reports),
        "documents": total("documents"),
        "cut_documents": total("cut_documents"),
        "dropped_fragments": total("dropped_fragments"),
        "dropped_tokens": total("dropped_tokens"),
        "tokens": total("tokens"),
        "padding_tokens": total("sequences") * job.sequence_length - total("tokens"),
        "seed": job.seed,
        "options": {
            "method": job.method,
            "min_fragment_tokens": job.min_fragment_tokens,
            "min_document_tokens": job.min_document_tokens,
            "max_document_tokens": job.max_document_tokens,
            "left_out_documents": total("left_out_documents") + total("overlong_dropped"),
        },
        **(_chat_entries(job, total) if job.overlong is not None else {}),
        "materialized": job.materialize,
        **({"groups": groups} if len(groups) > 1 else {}),
    }


def _chat_entries(job: PackJob, total: Callable[[str], int]) -> dict[str, Any]:
    names = ("overlong_dropped", "overlong_dropped_tokens", "overlong_cut", "overlong_cut_tokens")
    counts = {name.removeprefix("overlong_"): total(name) for name in names}
    return {"overlong": {"policy": job.overlong, **counts}, "target_tokens": total("target_tokens")}
