"""Bytes that one optimizer step reads and writes per bf16 weight of a rank's shard, by pass, without a GPU.

    python -m tests.benchmarks.optimizer_bytes [--json FILE]

A tiny model's step runs through megatron-core and Transformer Engine's Python code (TRANSFORMER_ENGINE_FOLDER), with
stand-ins for the kernels: torch's operations are counted as tests/helpers/byte_counter.py says, and an Adam kernel
reads every tensor that it is handed once and writes all of them but the gradients. "torch" is the step of a CPU without
Transformer Engine. Left out are the gradient's all-reduce or reduce-scatter and the gather of new weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import experiment_fields, make_corpus

SPLIT = {"use_precision_aware_optimizer": True}
MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    # settings of the optimizer, whether gradients are fp32
    "default": ({}, True),
    "default, bf16 gradients": ({}, False),
    "precision-aware": (SPLIT, True),
    "precision-aware, bf16 gradients": (SPLIT, False),
    "precision-aware, bf16 moments": (SPLIT | MOMENTS, True),
    "precision-aware, bf16 moments and gradients": (SPLIT | MOMENTS, False),
    "default, with average": ({"ema_decay": 0.5}, True),
    "precision-aware, with average": (SPLIT | {"ema_decay": 0.5}, True),
}
PASSES = ("zeros", "gradient copy", "norm", "clipping", "Adam", "conversions of moments", "weight copy", "average")
"""zeros: the gradient buffer before the first micro-batch. clipping: unless optimizer.clip_grad is 0. average: of the
weights, with optimizer.ema_decay."""


def count_cases(corpus: Path, with_transformer_engine: bool) -> dict[str, dict[str, float]]:
    """Bytes per weight of each case and pass."""
    if with_transformer_engine:
        from tests.helpers import transformer_engine_stub

        transformer_engine_stub.install()
    else:
        from hunyuan_pretrain.runtime import cpu_megatron

        cpu_megatron.install()
    return {name: _count(corpus, *case) for name, case in CASES.items()}


def _count(corpus: Path, optimizer: dict[str, Any], grad_reduce_in_fp32: bool) -> dict[str, float]:
    import hunyuan_pretrain.train.optimizer as module
    from tests.helpers.byte_counter import StepBytes
    from tests.helpers.one_rank import on_this_rank

    fields = experiment_fields(
        corpus,
        corpus / "run",
        precision={"dtype": "bf16", "grad_reduce_in_fp32": grad_reduce_in_fp32},
        optimizer={"lr": 1e-2, "clip_grad": 1e-3} | optimizer,
    )
    run = on_this_rank(fields)
    counter = StepBytes()
    for weight in run.wrapped[0].parameters():
        weight.main_grad.fill_(1.0)
    module.optimizer_step(run.optimizer)  # makes the state
    run.optimizer.zero_grad()
    with ExitStack() as stack:
        (part,) = run.optimizer.chained_optimizers
        stack.enter_context(_named(counter, module, "gradient_norm", "norm"))
        stack.enter_context(_named(counter, module, "follow", "average"))
        stack.enter_context(_named(counter, part.optimizer, "step", "conversions of moments"))
        stack.enter_context(_named(counter, part, "_copy_main_params_to_model_params", "weight copy"))
        stack.enter_context(_named(counter, part, "prepare_grads", "gradient copy"))
        stack.enter_context(_launches(counter))
        with counter:
            with counter.part("zeros"):
                run.wrapped[0].zero_grad_buffer()
            with counter.part("clipping"):
                # a gradient of zeros would not be clipped
                with _uncounted(counter):
                    for weight in run.wrapped[0].parameters():
                        weight.main_grad.fill_(1.0)
                module.optimizer_step(run.optimizer)
    size = sum(weight.numel() for weight in run.wrapped[0].parameters())
    found = {
        name: counter.counts[name, "forward"].bytes / size for name in PASSES if (name, "forward") in counter.counts
    }
    if type(part.optimizer).__module__.startswith(("torch.", "hunyuan_pretrain.")):
        found["Adam"] = found.pop("conversions of moments")  # torch's own kernel, or plain operations
    return found


@contextmanager
def _named(counter: Any, owner: Any, name: str, part: str) -> Iterator[None]:
    from unittest.mock import patch

    with patch.object(owner, name, counter.within(part, getattr(owner, name))):
        yield


@contextmanager
def _uncounted(counter: Any) -> Iterator[None]:
    counter._is_launching = True
    try:
        yield
    finally:
        counter._is_launching = False


@contextmanager
def _launches(counter: Any) -> Iterator[None]:
    """Count the Adam kernels of Transformer Engine, if it is there, by the tensors that they are handed."""
    import sys

    extension = sys.modules.get("transformer_engine_torch")
    if extension is None:
        yield
        return
    from transformer_engine.pytorch.optimizers import fused_adam

    from tests.helpers.byte_counter import size

    applier = fused_adam.multi_tensor_applier

    def launch(kernel: Any, overflow: Any, lists: list[list[Any]], *numbers: Any) -> None:
        gradients, *others = [sum(map(size, tensors)) for tensors in lists]
        with counter.part("Adam"):
            counter.add(gradients + sum(others), sum(others))
        with _uncounted(counter):
            applier(kernel, overflow, lists, *numbers)

    fused_adam.multi_tensor_applier = launch
    try:
        yield
    finally:
        fused_adam.multi_tensor_applier = applier


def markdown(found: dict[str, dict[str, float]]) -> str:
    """A row per case."""
    used = [name for name in PASSES if any(name in passes for passes in found.values())]
    lines = [f"| | {' | '.join(used)} | all |", f"|---|{'---|' * len(used)}---|"]
    for case, passes in found.items():
        cells = [f"{passes[name]:.0f}" if name in passes else "" for name in used]
        lines.append(f"| {case} | {' | '.join(cells)} | {sum(passes.values()):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        found = {
            kind: run_ranks(1, count_cases, corpus, kind == "Transformer Engine")[0]
            for kind in ("torch", "Transformer Engine")
        }
    for kind, cases in found.items():
        print(f"{kind}\n\n{markdown(cases)}\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
