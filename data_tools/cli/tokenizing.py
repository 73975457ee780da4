"""Commands that read a corpus: train a tokenizer on it, or tokenize it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from data_tools.cli.options import (
    Executor,
    ExecutorOptions,
    Extensions,
    Inputs,
    Logs,
    MaxRejects,
    Overwrite,
    Template,
    TextEndings,
    TextField,
    Where,
    extensions_of,
    path_of,
    refuse_without_executor,
    text_endings_of,
)
from hunyuan_pretrain.data.errors import DataFormatError


def train_tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Total number of ids, including the 209 special tokens.")],
    output: Annotated[str, typer.Option(callback=path_of, help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            callback=path_of, help="Ranks file (tiktoken) or tokenizer folder to extend; its tokens keep their ids."
        ),
    ] = None,
    base_size: Annotated[int | None, typer.Option(help="Keep only this many of the first ranks of the base.")] = None,
    where: Where = None,
    text_field: TextField = "text",
    extension: Extensions = None,
    text_ending: TextEndings = None,
    sample_fraction: Annotated[float, typer.Option(help="Share of the documents to train on, spread evenly.")] = 1.0,
    holdout_every: Annotated[
        int | None,
        typer.Option(
            help="Hold out one document in N, chosen by content, to measure on; default: 100 with "
            "--base, else 0 (none)."
        ),
    ] = None,
    report_by: Annotated[
        str, typer.Option(metavar="FIELD", help="JSON field by which the report is grouped.")
    ] = "lang",
    max_rejects: Annotated[int, typer.Option(min=0, help="Unreadable documents to skip before the command fails.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer with Hunyuan's split pattern, from scratch or as an extension of a base."""
    from rich.console import Console

    from data_tools.compression import ALL, print_report
    from data_tools.tokenizer_training import train_tokenizer as train

    tokenizer, report = train(
        inputs,
        vocab_size,
        output,
        text_field=text_field,
        extensions=extensions_of(extension),
        text_endings=text_endings_of(text_ending),
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


def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(callback=path_of, help="Folder of the tokenizer.")],
    output: Annotated[str, typer.Option(callback=path_of, help="Folder to write.")],
    text_field: TextField = "text",
    template: Template = None,
    where: Where = None,
    extension: Extensions = None,
    text_ending: TextEndings = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; default: all cores. With --executor: concurrent tasks. The output is the same."
        ),
    ] = None,
    max_rejects: MaxRejects = "0",
    holdout_every: Annotated[
        int | None, typer.Option(min=2, max=2**63 - 1, help="Write one document in N to --holdout-output instead.")
    ] = None,
    holdout_output: Annotated[
        str | None, typer.Option(callback=path_of, help="Folder for the held-out documents.")
    ] = None,
    shard_megabytes: Annotated[
        int | None, typer.Option(min=1, help="Text per shard in MB; default: 1/64 of the corpus, between 8 and 512.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help='The records are conversations, {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}. '
            "Only their answers are trained on, each with its <|eos|>.",
        ),
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help='The records are pairs for DPO, {"prompt": [messages], "chosen", "rejected"}: a conversation and two '
            "answers to it, each a text.",
        ),
    ] = False,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="With --chat or --pairs: of conversations without a system message; '' for none. Default: 'You are a "
            "helpful assistant.'"
        ),
    ] = None,
    train_end_of_user: Annotated[
        bool,
        typer.Option("--train-end-of-user", help="With --chat: also train on the <|extra_0|> before each answer."),
    ] = False,
    overwrite: Overwrite = False,
    executor: Annotated[
        Executor | None,
        typer.Option(
            help="Tokenize with datatrove tasks: on this machine, a Slurm cluster or a Ray cluster.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks for --executor, at most one per shard; default: 64.")
    ] = None,
    executor_option: ExecutorOptions = None,
    logs: Logs = None,
) -> None:
    """Tokenize text into Megatron's .bin and .idx, with a manifest. After an interruption the same command resumes with
    the unfinished shards."""
    from data_tools import tokenization
    from data_tools.tokenized_shard import Allowance

    settings: dict[str, Any] = {
        "form": _form(text_field, template, where, chat, pairs, system_prompt, train_end_of_user),
        "extensions": extensions_of(extension),
        "text_endings": text_endings_of(text_ending),
        "max_rejects": Allowance.parse(max_rejects),
        "holdout_every": holdout_every,
        "holdout_output": holdout_output,
        "shard_bytes": shard_megabytes * 1_000_000 if shard_megabytes else None,
        "overwrite": overwrite,
    }
    if executor is None:
        refuse_without_executor({"--tasks": tasks, "--executor-option": executor_option, "--logs": logs})
        manifests = tokenization.tokenize(
            inputs, tokenizer, output, workers=workers or tokenization.default_workers(), **settings
        )
    else:
        from data_tools.datatrove_pipeline import tokenize_on
        from data_tools.executors import parse_options

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
        if "chat" in manifest:
            share = manifest["target_tokens"] / manifest["tokens"]
            kind = "pairs" if manifest["chat"].get("pairs") else "conversations"
            print(f"{folder}: {kind}; {manifest['target_tokens']:,} tokens ({share:.1%}) are trained on")
    if manifests[0]["passed_over"]:
        print(f"{manifests[0]['passed_over']:,} records left out by --where")
    if manifests[0]["empty_documents"]:
        print(f"{manifests[0]['empty_documents']:,} empty documents left out")
    if manifests[0]["rejects"]:
        print(f"{manifests[0]['rejects']:,} records rejected; see {output}/{tokenization.REJECTS}")


def _form(
    text_field: str,
    template: str | None,
    where: list[str] | None,
    chat: bool,
    pairs: bool,
    system_prompt: str | None,
    train_end_of_user: bool,
) -> Any:
    """The RecordForm of the options. Raises DataFormatError for options without effect."""
    from data_tools.chat import DEFAULT_SYSTEM_PROMPT, ChatForm, PairForm
    from data_tools.records import RecordForm, parse_conditions

    conditions = parse_conditions(where or [])
    if chat and pairs:
        raise DataFormatError("--pairs: not with --chat; a pair is two conversations")
    if train_end_of_user and pairs:
        raise DataFormatError("--train-end-of-user: has no effect with --pairs, which compare answers; leave it out")
    if not chat and not pairs:
        for option, given in (("--system-prompt", system_prompt), ("--train-end-of-user", train_end_of_user or None)):
            if given is not None:
                raise DataFormatError(f"{option}: has no effect without --chat; give both or neither")
        return RecordForm(text_field, template, conditions)
    if template is not None or text_field != "text":
        read = "prompt, chosen and rejected" if pairs else "messages, or prompt and completion"
        raise DataFormatError(f"--{'pairs' if pairs else 'chat'}: reads {read}; leave out --text-field and --template")
    prompt = DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt
    if pairs:
        return PairForm(where=conditions, system_prompt=prompt)
    return ChatForm(where=conditions, system_prompt=prompt, train_end_of_user=train_end_of_user)
