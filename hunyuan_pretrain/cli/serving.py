"""The commands that serve an export, and that chat with one in the terminal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ExportPath = Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder written by export.")]
Lora = Annotated[
    Path | None, typer.Option(metavar="ADAPTER", help="LoRA adapter in PEFT's format, added to the weights in memory.")
]
System = Annotated[
    str | None,
    typer.Option(
        help="System prompt of chats that have no system message, '' for none; default: that with which the model was "
        "fine-tuned."
    ),
]
Device = Annotated[str, typer.Option(help="Where the model is computed, such as cuda.")]


class EngineName(StrEnum):
    """What computes."""

    transformers = "transformers"
    vllm = "vllm"


def serve(
    export: ExportPath,
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM OPTION...]", help="With --engine vllm: options of its server."),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="transformers: in this process. vllm: in a child that only this process reaches.")
    ] = EngineName.transformers,
    host: Annotated[str, typer.Option(help="Address to listen on. Any but loopback requires a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model in the API; default: of the folder.")] = None,
    system: System = None,
    lora: Lora = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the key of the API; default: the variable HUNYUAN_API_KEY."),
    ] = None,
    device: Device = "cpu",
    running: Annotated[int, typer.Option(min=1, help="Answers that are computed in turns.")] = 4,
    waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more get status 429.")] = 124,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; default: the positions of the model.")
    ] = None,
    body_mib: Annotated[int, typer.Option(min=1, max=1024, help="Largest body of a request, in MiB.")] = 16,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has vLLM and this package's plugin; default: the one that runs this."),
    ] = None,
) -> None:
    """Serve an export: OpenAI's API under /v1, and a chat page at /.

    Listens on this machine only, unless --host says otherwise. No code of the export runs.
    """
    from hunyuan_pretrain.serving.server import Options
    from hunyuan_pretrain.serving.server import serve as run

    options = Options(
        export=export,
        engine=engine.value,
        host=host,
        port=port,
        name=name,
        system=system,
        lora=lora,
        api_key_file=api_key_file,
        device=device,
        running=running,
        waiting=waiting,
        max_new_tokens=max_new_tokens,
        body_mib=body_mib,
        vllm_python=vllm_python,
        vllm_options=tuple(vllm_options or ()),
    )
    run(options, lambda line: print(line, flush=True))


def chat(
    export: ExportPath,
    lora: Lora = None,
    device: Device = "cpu",
    system: System = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 20,
    repetition_penalty: Annotated[float, typer.Option(min=0.1)] = 1.05,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; default: another answer each time.")] = None,
) -> None:
    """Chat with an export in the terminal.

    /reset forgets the conversation, /system TEXT sets the system prompt, Ctrl-C stops an answer, Ctrl-D ends. Reads
    one message per line if the input is not a terminal.
    """
    from hunyuan_pretrain.serving.generation import Sampling
    from hunyuan_pretrain.serving.terminal import run

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed=seed)
    run(export, lora, device, system, max_new_tokens, sampling)
