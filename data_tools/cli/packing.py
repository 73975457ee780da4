"""Commands for packed data: pack it, inspect it, and report what a run will read or has read."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from data_tools.cli.options import Executor, ExecutorOptions, Logs, Overwrite, path_of, refuse_without_executor


class Overlong(StrEnum):
    """What happens to conversations longer than a sequence."""

    error = "error"
    drop = "drop"
    cut_turns = "cut_turns"


class Method(StrEnum):
    """Packing methods."""

    best_fit = "best_fit"
    chop = "chop"


def pack(
    tokenized: Annotated[
        list[str],
        typer.Argument(
            callback=path_of, metavar="TOKENIZED...", help="Folders written by `tokenize`.", show_default=False
        ),
    ],
    sequence_length: Annotated[int, typer.Option(help="Tokens per packed sequence.")],
    output: Annotated[str, typer.Option(callback=path_of, help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for the order of the sequences.")] = 1234,
    method: Annotated[
        Method,
        typer.Option(
            help="best_fit cuts only documents longer than a sequence; chop concatenates the documents and cuts at "
            "every sequence length."
        ),
    ] = Method.best_fit,
    min_fragment_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter pieces of cut documents.")] = 1,
    min_document_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_document_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    materialize: Annotated[
        bool,
        typer.Option(
            "--materialize", help="Copy the tokens instead of referring to them: each sequence is one contiguous read."
        ),
    ] = False,
    group_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pack runs of shards of at most this many tokens each on their own. Bounds the memory; the bytes of "
            "the output depend on it.",
        ),
    ] = 100_000_000_000,
    overlong: Annotated[
        Overlong | None,
        typer.Option(
            help="Conversations longer than a sequence, which are never cut within a turn. error: refuse them. drop: "
            "leave them out. cut_turns: leave out their last turns. Default: error.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    executor: Annotated[
        Executor | None,
        typer.Option(
            help="Pack the groups with datatrove tasks: on this machine, a Slurm cluster or a Ray cluster.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks for --executor, at most one per group; default: 64.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Concurrent tasks of --executor; default: all, or for local one per core."),
    ] = None,
    executor_option: ExecutorOptions = None,
    logs: Logs = None,
) -> None:
    """Pack documents into sequences; only documents longer than a sequence are cut. After an interruption the same
    command resumes with the unfinished groups of shards."""
    settings: dict[str, Any] = {
        "seed": seed,
        "method": method.value,
        "min_fragment_tokens": min_fragment_tokens,
        "min_document_tokens": min_document_tokens,
        "max_document_tokens": max_document_tokens,
        "materialize": materialize,
        "group_tokens": group_tokens,
        "overlong": overlong.value if overlong else None,
        "overwrite": overwrite,
    }
    of_executor = {"--tasks": tasks, "--workers": workers, "--executor-option": executor_option, "--logs": logs}
    if executor is None:
        from data_tools.packed_output import pack as pack_folders

        refuse_without_executor(of_executor)
        manifest = pack_folders(tokenized, sequence_length, output, **settings)
    else:
        from data_tools.executors import parse_options
        from data_tools.packing_tasks import pack_on

        options = parse_options(executor, executor_option or [])
        chosen: dict[str, Any] = {"tasks": tasks or 64, "workers": workers, "logs": logs, "options": options}
        found = pack_on(executor, tokenized, sequence_length, output, **chosen, **settings)
        if found is None:  # submitted
            return
        manifest = found
    room = manifest["sequences"] * sequence_length
    packed = manifest["documents"] - manifest["options"]["left_out_documents"]
    print(
        f"{output}: {manifest['sequences']:,} sequences of {sequence_length:,} tokens, padding "
        f"{manifest['padding_tokens'] / room:.4%}, "
        f"{manifest['cut_documents']:,} of {packed:,} documents cut"
    )
    if "chat" in manifest:
        lost = manifest["overlong"]
        print(f"{manifest['target_tokens']:,} tokens are trained on; one epoch is stages.tokens={room:,}")
        print(
            f"conversations longer than a sequence: {lost['dropped']:,} left out ({lost['dropped_tokens']:,} tokens), "
            f"{lost['cut']:,} without their last turns ({lost['cut_tokens']:,} tokens)"
        )
    if manifest["dropped_tokens"]:
        print(f"left out {manifest['dropped_tokens']:,} tokens in {manifest['dropped_fragments']:,} short fragments")


def inspect(
    folder: Annotated[
        str, typer.Argument(callback=path_of, help="Folder written by `tokenize` or `pack`.", show_default=False)
    ],
    samples: Annotated[int, typer.Option(min=0, help="Documents or sequences to show.")] = 2,
    tokenizer: Annotated[
        str | None, typer.Option(callback=path_of, help="Folder of the tokenizer; without it, ids are shown.")
    ] = None,
    positions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of each sequence shown, print this many positions around its first label: token, label, and whether "
            "it is trained on.",
        ),
    ] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare it with its SHA-256.")] = False,
) -> None:
    """Show counts, lengths and samples of a tokenized or packed folder."""
    from rich.console import Console

    from data_tools.inspection import inspect as inspect_folder

    inspect_folder(
        folder,
        Console(highlight=False),
        num_samples=samples,
        tokenizer_path=tokenizer,
        verify=verify,
        num_positions=positions,
    )


def mix(
    config: Annotated[
        str, typer.Argument(callback=path_of, metavar="CONFIG", help="Experiment YAML.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as for training.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(callback=path_of, help="Folder for mix.json and a plot; default: only print.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what the stages of an experiment will read: tokens and epochs per source, padding, and the context that
    tokens see."""
    from rich.console import Console

    from data_tools.mixing import mix as print_mix

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    print_mix(config, overrides or [], output, console, overwrite=overwrite)


def where(
    run: Annotated[
        str,
        typer.Argument(callback=path_of, metavar="RUN", help="Run directory, or experiment YAML.", show_default=False),
    ],
    step: Annotated[int, typer.Option(help="Step, as metrics.jsonl counts it.")],
    place: Annotated[int | None, typer.Option(help="One position in the global batch; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per sequence and line.")] = False,
) -> None:
    """Show which documents were in the batch of a step, traced back to the files of the corpus."""
    from rich.console import Console

    from data_tools.where import where as print_where

    print_where(
        run,
        step,
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160),
        as_json=as_json,
        place=place,
    )


def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            callback=path_of,
            metavar="PATH...",
            help="Data folders, experiments or run directories.",
            show_default=False,
        ),
    ],
) -> None:
    """Read every file of data folders, or of all data of an experiment, and compare it with its SHA-256."""
    from data_tools.where import verify as verify_files

    print(f"{verify_files(paths)} files have the SHA-256 of their manifests")
