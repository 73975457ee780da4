"""Commands that evaluate: benchmarks, long context."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hunyuan_pretrain.cli.printing import print_table
from hunyuan_pretrain.cli.ranks import is_first_rank

Model = Annotated[Path, typer.Argument(metavar="EXPORT|RUN", help="Exported folder, or run directory.")]
Step = Annotated[int | None, typer.Option(help="RUN: checkpoint after this many steps; default: the newest.")]
Layout = Annotated[
    str | None, typer.Option(help="RUN under torchrun: such as tp=2,pp=2; default: that of the run, alone none.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: EXPORT: a GPU if there is one; RUN: as it says.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="EXPORT: texts at a time.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="RUN: tokens of a micro-batch, or one longer text.")]
Trust = Annotated[bool, typer.Option(help="Run the model code in EXPORT; our own exports do not need it.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")]


class WeightDtype(StrEnum):
    """Formats to compute in."""

    fp32 = "fp32"
    bf16 = "bf16"


Dtype = Annotated[WeightDtype | None, typer.Option(help="EXPORT: format to compute in; default: its own.")]


def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="hunyuan-base, hunyuan-instruct (the rows of the published tables), their rows such as mmlu, or any "
            "task of lm-eval; several with commas."
        ),
    ],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the benchmarks' files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; default: all.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Use the chat template; default: for hunyuan-instruct and judged benchmarks only."),
    ] = None,
    out: Out = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every item with its answer and score, as JSONL.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for the answers that another model judges.")
    ] = None,
    unsafe_code: Annotated[
        bool, typer.Option(help="Run programs that the model writes with your rights if there can be no sandbox.")
    ] = False,
    step: Step = None,
    layout: Layout = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    batch_tokens: BatchTokens = 4096,
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate an exported model, or a run's checkpoint under any layout, on benchmarks from local files.

    Never uses the network. RUN: under torchrun, each process is one rank. Programs that the model writes run in a
    sandbox, or not at all. Benchmarks that another model judges only have their answers written.
    """
    from hunyuan_pretrain.evaluation.requests import Request, check

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    request = Request(names, data, limit, chat, unsafe_code, out, samples, answers)
    check(request)
    opening = _opening(model, step, layout, device, dtype, batch_size, batch_tokens, trust_remote_code)
    with ExitStack() as stack:
        wanted = None
        if is_first_rank():
            from hunyuan_pretrain.evaluation.benchmarks import prepared, run

            wanted = stack.enter_context(prepared(request))
        opened = stack.enter_context(opening)
        if wanted is None or opened is None:
            return  # a rank other than the first
        report = run(opened, wanted)
    print_table(f"{model}{f', at most {limit} items of each task' if limit else ''}", report.rows)
    for line in report.notes:
        print(line)


def long_context(
    model: Model,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer, such as 4096,32768; K is 1024: 4K,32K,256K.")
    ] = "4K",
    tasks: Annotated[
        str | None,
        typer.Option(help="niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe; default: all that apply."),
    ] = None,
    languages: Annotated[str, typer.Option(help="Of the texts: en, zh.")] = "en,zh",
    depths: Annotated[str, typer.Option(help="Where the needle is, 0 (begin) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each task, language, length and depth.")] = 5,
    chat: Annotated[bool, typer.Option(help="Use the chat template.")] = False,
    by_loss: Annotated[
        bool, typer.Option(help="Score the right answer token by token, for models too small to answer.")
    ] = False,
    seed: Annotated[int, typer.Option()] = 1234,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the tables as heat maps.")] = None,
    out: Out = None,
    step: Step = None,
    layout: Layout = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 1,
    batch_tokens: BatchTokens = 4096,
    trust_remote_code: Trust = False,
) -> None:
    """Find what is hidden in long texts: six tasks of RULER, in English and Chinese, of exact lengths in tokens.

    The texts are made here. Prints depth against length for each task: percent found, or with --by-loss the loss of the
    right answer, and in brackets its loss where the text says something else.
    """
    from hunyuan_pretrain.evaluation import refuse_unwritable
    from hunyuan_pretrain.evaluation.long_context import check, heat_maps, run, write
    from hunyuan_pretrain.evaluation.long_context import plan as make_plan

    plan = make_plan(lengths, tasks, languages, depths, samples, chat, by_loss, seed)
    check(plan)
    refuse_unwritable({"--out": out, "--plot": plot})
    if plot is not None:
        import matplotlib  # noqa: F401  # a missing package is said before the model is read
    with _opening(model, step, layout, device, dtype, batch_size, batch_tokens, trust_remote_code) as opened:
        if opened is None:
            return  # a rank other than the first
        from hunyuan_pretrain.checkpoint.workers import to_stderr

        records = run(opened, plan, to_stderr)
        for title, rows in heat_maps(records, by_loss):
            print_table(title, rows)
        write(records, plan, opened, out, plot)


def bits_per_byte(
    model: Model,
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help='.jsonl with {"text": ...}, or plain text.')],
    short_context: Annotated[
        int, typer.Option(min=1, help="Tokens of context, up to twice as many, to compare with.")
    ] = 256,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Read at most so many tokens; default: all.")] = None,
    out: Out = None,
    step: Step = None,
    layout: Layout = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4096,
    trust_remote_code: Trust = False,
) -> None:
    """Bits per byte of texts by position, and of the same tokens with little context: does the model use its
    context?"""
    from hunyuan_pretrain.evaluation import refuse_unwritable
    from hunyuan_pretrain.evaluation.positions import as_table, read_texts, run, write

    found = read_texts(texts)
    refuse_unwritable({"--out": out})
    with _opening(model, step, layout, device, dtype, 1, batch_tokens, trust_remote_code) as opened:
        if opened is None:
            return  # a rank other than the first
        records = run(opened, found, short_context, max_tokens)
        print_table(f"{model}: bits per byte of {texts}", as_table(records, short_context))
        write(records, opened, texts, short_context, out)


def _opening(
    model: Path,
    step: int | None,
    layout: str | None,
    device: str | None,
    dtype: WeightDtype | None,
    batch_size: int,
    batch_tokens: int,
    trust_remote_code: bool,
) -> AbstractContextManager[Any]:
    """Opens the model when it is entered; this prepares the process. Options of the other kind of model are refused."""
    from hunyuan_pretrain.evaluation import EvaluationError
    from hunyuan_pretrain.evaluation.opened import is_export, open_export, open_run
    from hunyuan_pretrain.evaluation.quiet import stay_offline

    stay_offline()
    if is_export(model):
        if step is not None or layout is not None:
            raise EvaluationError(f"--step and --layout are for a run; {model} is an exported model")
        from hunyuan_pretrain.runtime import cpu_megatron

        cpu_megatron.install()
        return open_export(
            model,
            device=device,
            batch_size=batch_size,
            dtype=dtype.value if dtype else None,
            trust_remote_code=trust_remote_code,
        )
    if dtype is not None or trust_remote_code:
        raise EvaluationError(f"--dtype and --trust-remote-code are for an exported model; {model} is a run")
    from hunyuan_pretrain.config.history import read_history
    from hunyuan_pretrain.runtime.environment import prepare

    history = read_history(model)
    if not history:
        raise EvaluationError(f"{model}: not a run directory")
    config = history[-1].config
    if device is not None:
        config = config.model_copy(
            update={"runtime": config.runtime.model_copy(update={"device": device.partition(":")[0]})}
        )
    prepare(config)
    from hunyuan_pretrain.checkpoint.workers import to_stderr

    return open_run(model, step=step, layout=layout, batch_tokens=batch_tokens, device=device, say=to_stderr)
