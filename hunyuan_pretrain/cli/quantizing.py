"""The command that writes an 8-bit copy of an export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hunyuan_pretrain.cli.printing import print_table


class QuantizationScheme(StrEnum):
    """What is 8 bits wide."""

    int8 = "int8"
    fp8 = "fp8"
    fp8_static = "fp8-static"


class CacheFormat(StrEnum):
    """Formats of the key/value cache that need scales."""

    fp8 = "fp8"


def quantize(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder written by export --dtype bf16.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    scheme: Annotated[
        QuantizationScheme,
        typer.Option(
            help="int8: weights. fp8: weights and inputs, scales of inputs per token. fp8-static: the same with stored "
            "scales of inputs."
        ),
    ],
    kv_cache: Annotated[
        CacheFormat | None, typer.Option(help="Also store scales for a key/value cache of this format.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXTS", help='Texts for scales of activations: .jsonl with {"text": ...}, or plain text.'
        ),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(metavar="TEXTS", help="Texts to compare on; default: part of --calibration.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most sequences to calibrate with, and to compare on.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=3, help="Most tokens of a sequence.")] = 2048,
    one_scale_per_tensor: Annotated[
        bool, typer.Option(help="fp8: one scale per weight tensor, as the tensorwise recipe trains.")
    ] = False,
    device: Annotated[str, typer.Option(help="What computes, such as cuda: one layer at a time.")] = "cpu",
) -> None:
    """Write an 8-bit copy of an export for vLLM (compressed-tensors), read it back, and compare it with the export."""
    from hunyuan_pretrain.checkpoint.quantize import quantize as write

    certificate = write(
        export,
        output,
        scheme.value,
        fp8_kv_cache=kv_cache is not None,
        calibration=calibration,
        held_out=held_out,
        samples=samples,
        sequence_length=sequence_length,
        one_scale_per_tensor=one_scale_per_tensor,
        device=device,
        log=print,
    )
    columns = next(iter(certificate["table"].values()))
    rows = [(name, *(f"{value:.6g}" for value in row.values())) for name, row in certificate["table"].items()]
    text = f"{certificate['positions']} positions of {certificate['held_out_text']}"
    print_table(f"{output}, {text}", [("", *columns), *rows])
