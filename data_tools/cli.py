"""`hunyuan-data`: from text to packed datasets. No logic here; each command calls one function."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from hunyuan_pretrain.config.extras import missing_package
from hunyuan_pretrain.data.errors import DataFormatError

app = typer.Typer(
    help="Prepare training data: train a tokenizer, tokenize text, pack it into sequences, look at the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _path(given: Any) -> Any:
    """A path, or several, with ~ for the home folder; what a shell would have replaced and did not is refused."""
    if isinstance(given, list | tuple):
        return [_path(path) for path in given]
    if given is None or os.path.exists(given):
        return given
    if not given.strip():
        raise DataFormatError(f"path {given!r}: is empty; a variable of the shell may have no value")
    if re.search(r"\$\{?\w", given):
        raise DataFormatError(
            f"{given}: holds a variable that the shell did not replace; write it in double quotes or without any"
        )
    return os.path.expanduser(given)


Inputs = Annotated[
    list[str],
    typer.Argument(
        callback=_path,
        metavar="INPUT...",
        help="Files of text, of JSON lines or arrays (each also as .gz, .zst, .bz2, .xz) or of parquet; folders of "
        "them, links followed; "
        "patterns; or URLs that fsspec opens. What a file holds is told by its content.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--extension",
        help="Endings read in folders in place of the default, repeatable; default .txt .md .py .jsonl .ndjson "
        ".jsonlines .json .parquet. "
        "Others are counted and not read.",
    ),
]
TextEndings = Annotated[
    list[str] | None,
    typer.Option(
        "--text-ending",
        help="One more ending whose files are read as plain text, such as .rst; repeatable; 'none': no ending.",
    ),
]
MaxRejects = Annotated[
    str,
    typer.Option(help="Unreadable documents to leave out before the command fails: a number, or a share such as 0.1%."),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"Text made of several fields instead of --text-field, in single quotes: '{title}\n\n{text}'. {NAME} is "
        r"a field; "
        r"\n, \t and \\ are a line break, a tab and a backslash; {{ and }} are braces. Text files have no fields "
        r"and are read as they are.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="FIELD=VALUE",
        help="Only records with this value, as JSON writes it (lang=zh, good=true); repeatable, any of a field's "
        "values will do. What it "
        "leaves out is counted; text files have no fields and are left out.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")]


class Executor(StrEnum):
    """Executors of datatrove."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


class Method(StrEnum):
    """Ways to pack."""

    best_fit = "best_fit"
    chop = "chop"


@app.command("train-tokenizer")
def train_tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Ids in all, the 209 special tokens included.")],
    output: Annotated[str, typer.Option(callback=_path, help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            callback=_path, help="Ranks file (tiktoken) or tokenizer folder whose tokens come first, with their ids."
        ),
    ] = None,
    base_size: Annotated[int | None, typer.Option(help="Keep only the first so many ranks of the base.")] = None,
    where: Where = None,
    text_field: TextField = "text",
    extension: Extensions = None,
    text_ending: TextEndings = None,
    sample_fraction: Annotated[float, typer.Option(help="Share of the documents to train on, spread evenly.")] = 1.0,
    holdout_every: Annotated[
        int | None,
        typer.Option(
            help="Measure on one document in so many, by its content, and do not train on it; default 100 with "
            "--base, else 0."
        ),
    ] = None,
    report_by: Annotated[
        str, typer.Option(metavar="FIELD", help="JSON field by which the report is divided.")
    ] = "lang",
    max_rejects: Annotated[
        int, typer.Option(min=0, help="Unreadable documents to leave out before the command fails.")
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer under Hunyuan's split pattern, from scratch or after the tokens of a base."""
    from rich.console import Console

    from data_tools.compression import ALL, print_report
    from data_tools.tokenizer_training import train_tokenizer as train

    tokenizer, report = train(
        inputs,
        vocab_size,
        output,
        text_field=text_field,
        extensions=_extensions(extension),
        text_endings=_text_endings(text_ending),
        sample_fraction=sample_fraction,
        max_rejects=max_rejects,
        overwrite=overwrite,
        base=base,
        base_size=base_size,
        where=where or (),
        holdout_every=holdout_every,
        report_by=report_by,
    )
    measured = report["groups"][ALL]
    print(f"{output}: {tokenizer.vocab_size:,} ids, digest {tokenizer.digest[:12]}")
    print(
        f"{measured['characters_per_token']:.2f} characters/token, {measured['bytes_per_token']:.2f} bytes/token "
        f"on {measured['bytes'] / 1e6:,.1f} MB of {report['measured_on']}"
    )
    if cut := report["trained_on"]["long_words_cut"]:
        print(
            f"{cut:,} words of more than {report['trained_on']['long_word_tokens']:,} tokens of the base were "
            "cut for training"
        )
    left_out = report["left_out"]
    if left_out["rejects"] or left_out["by_where"]:
        print(f"left out: {left_out['rejects']:,} records rejected, {left_out['by_where']:,} by --where")
    print_report(report, Console(highlight=False))


@app.command()
def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(callback=_path, help="Folder of the tokenizer.")],
    output: Annotated[str, typer.Option(callback=_path, help="Folder to write.")],
    text_field: TextField = "text",
    template: Template = None,
    where: Where = None,
    extension: Extensions = None,
    text_ending: TextEndings = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; default all cores. With --executor: tasks at a time. Does not change the output."
        ),
    ] = None,
    max_rejects: MaxRejects = "0",
    holdout_every: Annotated[
        int | None, typer.Option(min=2, max=2**63 - 1, help="Write one document in N to --holdout-output instead.")
    ] = None,
    holdout_output: Annotated[
        str | None, typer.Option(callback=_path, help="Folder for the documents held out.")
    ] = None,
    shard_megabytes: Annotated[
        int | None, typer.Option(min=1, help="Text in a shard; default a 64th of all, 8 to 512.")
    ] = None,
    overwrite: Overwrite = False,
    executor: Annotated[
        Executor | None,
        typer.Option(
            help="Tokenize in tasks of datatrove: on this machine, a Slurm or a Ray cluster.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks of --executor, at most one a shard; default 64.")
    ] = None,
    executor_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for datatrove's executor, such as partition=cpu; repeatable.")
    ] = None,
    logs: Annotated[
        str | None, typer.Option(callback=_path, help="Folder for the logs of --executor; default OUTPUT.logs.")
    ] = None,
) -> None:
    """Tokenize text into Megatron's .bin and .idx, with a manifest. Interrupted, the same command goes on with what is
    not finished."""
    from data_tools import tokenization
    from data_tools.records import RecordForm, parse_conditions
    from data_tools.tokenized_shard import Allowance

    settings: dict[str, Any] = {
        "form": RecordForm(text_field, template, parse_conditions(where or [])),
        "extensions": _extensions(extension),
        "text_endings": _text_endings(text_ending),
        "max_rejects": Allowance.parse(max_rejects),
        "holdout_every": holdout_every,
        "holdout_output": holdout_output,
        "shard_bytes": shard_megabytes * 1_000_000 if shard_megabytes else None,
        "overwrite": overwrite,
    }
    if executor is None:
        for option, value in (("--tasks", tasks), ("--executor-option", executor_option), ("--logs", logs)):
            if value is not None:
                raise DataFormatError(f"{option}: has no effect without --executor; give both or neither")
        manifests = tokenization.tokenize(
            inputs, tokenizer, output, workers=workers or tokenization.default_workers(), **settings
        )
    else:
        from data_tools.datatrove_pipeline import parse_options, tokenize_on

        options = parse_options(executor, executor_option or [])
        of_executor: dict[str, Any] = {"tasks": tasks or 64, "workers": workers, "logs": logs, "options": options}
        found = tokenize_on(executor, inputs, tokenizer, output, **of_executor, **settings)
        if found is None:  # submitted
            return
        manifests = found
    for folder, manifest in zip((output, holdout_output), manifests, strict=False):
        bytes_per_token = manifest["bytes"] / manifest["tokens"]
        print(
            f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
            f"{len(manifest['shards'])} shards, "
            f"{bytes_per_token:.2f} bytes/token"
        )
    if manifests[0]["passed_over"]:
        print(f"{manifests[0]['passed_over']:,} records left out by --where")
    if manifests[0]["empty_documents"]:
        print(f"{manifests[0]['empty_documents']:,} empty documents left out")
    if manifests[0]["rejects"]:
        print(f"{manifests[0]['rejects']:,} records rejected; see {output}/{tokenization.REJECTS}")


@app.command()
def pack(
    tokenized: Annotated[
        list[str],
        typer.Argument(
            callback=_path, metavar="TOKENIZED...", help="Folders written by `tokenize`.", show_default=False
        ),
    ],
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed sequence.")],
    output: Annotated[str, typer.Option(callback=_path, help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the order of the sequences.")] = 1234,
    method: Annotated[
        Method,
        typer.Option(
            help="best_fit cuts only documents longer than a sequence; chop cuts at every sequence length, as "
            "others do."
        ),
    ] = Method.best_fit,
    min_fragment_tokens: Annotated[
        int, typer.Option(min=1, help="Leave out shorter pieces of documents that are cut.")
    ] = 1,
    min_document_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_document_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    materialize: Annotated[
        bool,
        typer.Option(
            "--materialize", help="Copy the tokens, instead of pointing at them: each sequence is read in one stretch."
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack documents into sequences; only documents longer than a sequence are cut."""
    from data_tools.packed_output import pack as pack_folders

    manifest = pack_folders(
        tokenized,
        sequence_length,
        output,
        seed=seed,
        method=method.value,
        min_fragment_tokens=min_fragment_tokens,
        min_document_tokens=min_document_tokens,
        max_document_tokens=max_document_tokens,
        materialize=materialize,
        overwrite=overwrite,
    )
    room = manifest["sequences"] * sequence_length
    packed = manifest["documents"] - manifest["options"]["left_out_documents"]
    print(
        f"{output}: {manifest['sequences']:,} sequences of {sequence_length:,} tokens, padding "
        f"{manifest['padding_tokens'] / room:.4%}, "
        f"{manifest['cut_documents']:,} of {packed:,} documents cut"
    )
    if manifest["dropped_tokens"]:
        print(f"left out {manifest['dropped_tokens']:,} tokens in {manifest['dropped_fragments']:,} short fragments")


@app.command()
def inspect(
    folder: Annotated[
        str, typer.Argument(callback=_path, help="Folder written by `tokenize` or `pack`.", show_default=False)
    ],
    samples: Annotated[int, typer.Option(min=0, help="Documents or sequences to show.")] = 2,
    tokenizer: Annotated[
        str | None, typer.Option(callback=_path, help="Folder of the tokenizer; without it, ids are shown.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its SHA-256.")] = False,
) -> None:
    """Show counts, lengths and samples of a tokenized or packed folder."""
    from rich.console import Console

    from data_tools.inspection import inspect as inspect_folder

    inspect_folder(folder, Console(highlight=False), num_samples=samples, tokenizer_path=tokenizer, verify=verify)


@app.command()
def mix(
    config: Annotated[
        str, typer.Argument(callback=_path, metavar="CONFIG", help="Experiment YAML.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as for training.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(callback=_path, help="Folder for mix.json and a picture; default: only print.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say what the stages of an experiment will read: tokens and epochs by source, padding, and the context that tokens
    see."""
    from rich.console import Console

    from data_tools.mixing import mix as print_mix

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    print_mix(config, overrides or [], output, console, overwrite=overwrite)


@app.command()
def where(
    run: Annotated[
        str,
        typer.Argument(callback=_path, metavar="RUN", help="Run directory, or experiment YAML.", show_default=False),
    ],
    step: Annotated[int, typer.Option(help="Step, as metrics.jsonl counts it.")],
    place: Annotated[int | None, typer.Option(help="One place of the global batch; default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sequence and line.")] = False,
) -> None:
    """Say which documents were in the batch of a step, back to the files of the corpus."""
    from rich.console import Console

    from data_tools.where import where as print_where

    print_where(
        run,
        step,
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160),
        as_json=as_json,
        place=place,
    )


@app.command()
def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            callback=_path, metavar="PATH...", help="Data folders, experiments or run directories.", show_default=False
        ),
    ],
) -> None:
    """Read every file of data folders, or of all the data of an experiment, and compare it with its SHA-256."""
    from data_tools.where import verify as verify_files

    print(f"{verify_files(paths)} files have the SHA-256 of their manifests")


class _StoppedError(BaseException):
    """SIGTERM or Ctrl-C, in the main thread, so that what is unfinished is taken back on the way out."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the way out must come to its end
    raise _StoppedError(number)


def main() -> None:
    """Run the command line. An error the user can put right is one message on stderr and exit code 2; a SIGTERM is 75,
    Ctrl-C 130."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        app()
    except _StoppedError as stopped:
        print(
            "hunyuan-data: stopped; nothing half-written stays, and `tokenize` goes on by the same command",
            file=sys.stderr,
        )
        sys.exit(75 if stopped.args == (signal.SIGTERM,) else 130)
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        _fail(missing)
    except ValueError as error:
        # imported only when something failed, because it takes a tenth of a second here and in every worker
        from hunyuan_pretrain.config.schema import ConfigError

        if not isinstance(error, DataFormatError | ConfigError):
            raise
        _fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                "no space left on the disk of the output; nothing half-written stays, and what `tokenize` had "
                "finished is gone on from"
            )
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> None:
    print(f"hunyuan-data: {message}", file=sys.stderr)
    sys.exit(2)


def _extensions(given: list[str] | None) -> list[str]:
    from data_tools.corpus import DEFAULT_EXTENSIONS

    return [_ending("--extension", extension) for extension in given or DEFAULT_EXTENSIONS]


def _text_endings(given: list[str] | None) -> list[str]:
    return ["" if ending == "none" else _ending("--text-ending", ending) for ending in given or []]


def _ending(option: str, given: str) -> str:
    from data_tools.formats import COMPRESSED_ENDINGS

    ending = given.lower() if given.startswith(".") else f".{given.lower()}"
    if ending in COMPRESSED_ENDINGS or any(ending.endswith(compressed) for compressed in COMPRESSED_ENDINGS):
        raise DataFormatError(
            f"{option} {given}: compressed files go by the ending before it; give {ending.split('.')[1]} or the like"
        )
    if not re.fullmatch(r"\.[^\s./*?\[\],;]+", ending):
        raise DataFormatError(f"{option} {given}: not an ending; write one such as .rst, and repeat {option} for more")
    return ending


if __name__ == "__main__":
    main()
