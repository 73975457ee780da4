"""Commands for models in Hugging Face format: write, import, merge with an adapter, generate text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExportDtype(StrEnum):
    """Formats of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class MergedDtype(StrEnum):
    """Formats of merged weights."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class ExportWeights(StrEnum):
    """Which weights of a checkpoint."""

    trained = "trained"
    ema = "ema"


class ExportFormat(StrEnum):
    """Layouts of an export."""

    hunyuan = "hunyuan"
    hunyuan_v1_moe = "hunyuan_v1_moe"
    gguf = "gguf"


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a training run.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint after this many steps; default: the newest.")] = None,
    dtype: Annotated[ExportDtype | None, typer.Option(help="Format of the weights; default: as in training.")] = None,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hunyuan: with our own model code. hunyuan_v1_moe: loads natively in transformers and vLLM. gguf: "
            "refused, with the reason."
        ),
    ] = ExportFormat.hunyuan,
    weights: Annotated[
        ExportWeights,
        typer.Option(help="trained: those of training. ema: their moving average (optimizer.ema_decay)."),
    ] = ExportWeights.trained,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Identifier for the model card, such as apache-2.0; default: unknown."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Verify, convert and digest files in this many processes; default: by size and cores."
        ),
    ] = None,
) -> None:
    """Write a checkpoint in Hugging Face format, read it back, and compare it layer by layer with the training model.

    Memory holds one layer, whatever the size of the model. Of a run with LoRA, the adapter is written as PEFT does.
    """
    from hunyuan_pretrain.runtime.environment import prepare

    prepare(None)

    from hunyuan_pretrain.checkpoint.export_run import export_run
    from hunyuan_pretrain.checkpoint.workers import to_stderr

    certificate = export_run(
        run,
        output,
        step=step,
        dtype=dtype.value if dtype else None,
        format=format.value,
        licence=licence,
        processes=processes,
        which=weights.value,
        say=to_stderr,
    )
    average = ", moving average of the weights" if weights == ExportWeights.ema else ""
    print(f"{output}: {certificate['format']}, {certificate['dtype']}, step {certificate['source']['step']}{average}")
    if certificate["format"] == "peft":
        print(
            f"an adapter of {certificate['base']['path']}: {certificate['tensors']:,} tensors, read back and compared"
        )
        print("with an export of that base: hunyuan-pretrain merge-lora BASE_EXPORT ADAPTER OUT")
        return
    print(
        f"logits against the training model: largest difference {certificate['max_abs_difference']:.3g}, see "
        "certificate.json"
    )
    if certificate["loaded_as_a_whole"] is not True:
        print(f"loaded as a whole: {certificate['loaded_as_a_whole']}")


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder in Hugging Face format.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write, for checkpoint.init_from.")],
    dtype: Annotated[
        ExportDtype | None, typer.Option(help="Format of the weights; default: bf16 for bf16 and FP8, otherwise fp32.")
    ] = None,
) -> None:
    """Turn a model in Hugging Face format into weights from which training continues under every layout.

    Reads exports of this project, Tencent's releases of Hunyuan-Large and its MoE successors in bf16 and FP8, and what
    transformers' hunyuan_v1_moe saves. Lists what could not be carried over.
    """
    from hunyuan_pretrain.runtime.environment import prepare

    prepare(None)

    from hunyuan_pretrain.checkpoint.hf_import import import_model

    done = import_model(folder, output, dtype=dtype.value if dtype else None)
    print(
        f"{output}: {done.parameters:,} weights of a {done.model_type} model, {done.dtype}, {done.bytes / 1e9:.3g} GB"
    )
    for note in done.notes:
        print(f"  note: {note}")
    print(f"continue: complete {output / 'experiment.yaml'}, then hunyuan-pretrain train {output / 'experiment.yaml'}")


def merge_lora(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Model folder in Hugging Face format.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="LoRA adapter that PEFT saved.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    dtype: Annotated[MergedDtype | None, typer.Option(help="Format of the weights; default: that of the base.")] = None,
) -> None:
    """Add a LoRA adapter to the weights of its base, in fp32 and rounded once; everything else is copied."""
    from hunyuan_pretrain.checkpoint.lora_merge import merge_lora as merge

    done = merge(base, adapter, output, dtype=dtype.value if dtype else None)
    print(f"{output}: {done.changed} of {done.tensors} tensors changed, {done.dtype}")
    for name in done.left_out:
        print(f"  note: {name} of the base is not copied: it is not true of the merged weights")


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by export.")],
    prompt: Annotated[str, typer.Option(help="Beginning of the text, or with --chat the user's turn.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 20,
    repetition_penalty: Annotated[float, typer.Option(min=0.1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 1234,
    chat: Annotated[bool, typer.Option(help="Use the chat template.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the model code in DIR; our own exports do not need it.")
    ] = False,
) -> None:
    """Continue a text with an exported model, streaming to standard output."""
    from hunyuan_pretrain.checkpoint.generate import generate as stream

    stream(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
        trust_remote_code=trust_remote_code,
    )
