"""One-line layouts such as "tp=2,pp=2", and an experiment rewritten for one of them, for comparisons. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment, OptimizerConfig, ParallelConfig

Precision = Literal["fp32", "bf16", "fp8"]
Engine = Literal["own", "te"]

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
CHOICES = {"recompute": "recompute", "method": "context_parallel_method"}
MAY_BE_0 = ("zero1", "offload")
KEYS = (*SIZES, "dp", "micro", *MAY_BE_0, *CHOICES)


def layout_experiment(
    experiment: Experiment,
    layout: str,
    num_ranks: int | None,
    folder: Path,
    precision: Precision = "fp32",
    engine: Engine = "own",
) -> tuple[Experiment, int]:
    """(experiment under a layout such as "tp=2,pp=2" with run_dir `folder`, its number of ranks).

    Sizes that the layout does not name are 1, except dp, which uses up `num_ranks` if that is given. If the layout does
    not name micro (sequences per micro-batch), zero1 (distributed optimizer, 0 or 1), offload (layers of a stage whose
    activations wait in host memory), recompute or method (of context parallelism), they stay as in the experiment.
    precision: fp32 and bf16 turn FP8 off; fp8 uses the experiment's recipe. engine: this project's layers (own) or
    Transformer Engine's (te). Raises ConfigError if the layout is invalid, breaks a rule of the experiment, or needs
    another number of ranks than `num_ranks`.
    """
    values = _parse(layout)
    sizes = {field: int(values.get(key, 1)) for key, field in SIZES.items()}
    changes: dict[str, Any] = dict(sizes) | {
        "world_size": None,
        "sequence_parallel": sizes["tensor_model_parallel_size"] > 1,
    }
    if sizes["expert_model_parallel_size"] == 1 or sizes["tensor_model_parallel_size"] > 1:
        changes["overlap_shared_expert"] = False
    if any(sizes[SIZES[key]] != getattr(experiment.parallel, SIZES[key]) for key in ("pp", "vpp")):
        changes["pipeline_layout"] = None
    if "zero1" in values:
        changes["use_distributed_optimizer"] = bool(int(values["zero1"]))
        if not changes["use_distributed_optimizer"]:
            changes["overlap_param_gather"] = False
    if "offload" in values:
        changes["cpu_offloading_num_layers"] = int(values["offload"])
    changes |= {field: values[key] for key, field in CHOICES.items() if key in values}
    fields = experiment.model_dump()
    fields["parallel"] = ParallelConfig.model_validate(experiment.parallel.model_dump() | changes).model_dump()
    fields["precision"] = _number_formats(experiment, precision)
    fields["runtime"]["transformer_engine"] = "required" if engine == "te" else "never"
    fields["runtime"]["verify_data"] = "sizes"  # whether two layouts agree does not depend on the data they read
    # Adam divides a gradient by its own size: with a small epsilon, the sign of rounding noise would become an update
    fields["optimizer"]["adam_eps"] = max(experiment.optimizer.adam_eps, 1e-3)
    if experiment.optimizer.expert_lr_noise_scale_tokens == "measured":
        fields["optimizer"]["expert_lr_noise_scale_tokens"] = None
    fields["optimizer"]["measure_noise_scale_every_steps"] = None  # not every layout can; it changes nothing in a step
    if precision == "fp32":  # the other formats of optimizer state are for bf16 weights
        formats = ("use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype")
        fields["optimizer"] |= {name: OptimizerConfig.model_fields[name].default for name in formats}
    fields["run_dir"] = str(folder)
    fields["evaluation"] = experiment.evaluation.of_nothing().model_dump()
    fields["logging"] |= {"wandb": "disabled", "tensorboard": False}
    if "micro" in values:
        for stage in fields["stages"]:
            stage["micro_batch_sequences"] = int(values["micro"])
    result = Experiment.model_validate(fields)
    needed = math.prod(sizes[SIZES[key]] for key in ("tp", "pp", "cp"))
    if num_ranks is None and "dp" not in values:
        _refuse_experts_without_ranks(layout, sizes)
    ranks = num_ranks if num_ranks and "dp" not in values else needed * int(values.get("dp", 1))
    rules.check(result, world_size=ranks, source=f"layout {layout}")
    if num_ranks is not None and ranks != num_ranks:
        raise ConfigError(
            f"layout {layout}",
            [Problem("dp", int(values["dp"]), f"makes {ranks} ranks, the job has {num_ranks}", "leave dp out")],
        )
    return result, ranks


def _number_formats(experiment: Experiment, precision: Precision) -> dict[str, Any]:
    mine = experiment.precision
    if precision != "fp8":  # no FP8: a last-bit difference from another summation order could become a whole FP8 step
        return {"dtype": precision, "grad_reduce_in_fp32": mine.grad_reduce_in_fp32}
    if mine.fp8_recipe is None:
        rule = "the experiment has no recipe"
        raise ConfigError(
            "--precision fp8", [Problem("precision.fp8_recipe", None, rule, "add precision.fp8_recipe=blockwise, say")]
        )
    return mine.model_dump()


def _refuse_experts_without_ranks(layout: str, sizes: dict[str, int]) -> None:
    """Raise ConfigError if the layout needs dp for its experts: they use the ranks of tp, cp and dp, and dp is 1 if the
    layout leaves it out."""
    tp, cp, ep, etp = (sizes[SIZES[key]] for key in ("tp", "cp", "ep", "etp"))
    dp = ep * etp // math.gcd(ep * etp, tp * cp)
    if dp > 1:
        rule = f"the {ep * etp} expert ranks are part of tp * cp * dp, which is {tp * cp} because the layout has no dp"
        raise ConfigError(f"layout {layout}", [Problem("ep", ep, rule, f"write dp={dp},{layout}")])


def _parse(layout: str) -> dict[str, str]:
    """{"tp": "2", ...} of "tp=2,..."; raises ConfigError with every unknown or unreadable part."""
    values, problems = {}, []
    for part in filter(None, layout.split(",")):
        key, _, value = part.partition("=")
        if key not in KEYS:
            problems.append(Problem(key, Problem.NO_VALUE, "unknown part of a layout", f"use {', '.join(KEYS)}"))
        elif key in CHOICES:
            allowed = get_args(ParallelConfig.model_fields[CHOICES[key]].annotation)
            if value not in allowed:
                problems.append(Problem(key, value, "no such choice", f"use {', '.join(allowed)}"))
        elif not value.isdecimal() or (int(value) < 1 and key not in MAY_BE_0):
            problems.append(Problem(key, value, "not a number of at least 1", "such as tp=2"))
        values[key] = value
    if problems:
        raise ConfigError(f"layout {layout}", problems)
    return values
