"""`hunyuan-pretrain shadow`: trains the same steps in the experiment's number format and under an FP8 recipe.

Two passes over the same data, from the same state, answer two questions. How does training proceed: the recipe trains
on its own, and its losses are shown next to those without it. What does the recipe do to a gradient: along the weights
of training without it, each batch's gradient is computed with and without the recipe, and saturated values and values
flushed to zero are counted.

Expert gradients differ most, because rounding sends some tokens to other experts; their share is reported by layer.

A gradient is an estimate and differs from batch to batch. `batch_noise` is that difference between consecutive batches:
a recipe error much smaller than it does not matter.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.checkpoint.folders import named_checkpoints
from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.decisions import LEDGER
from hunyuan_pretrain.config.derived import smallest_world_size
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.recipe import Operand
from hunyuan_pretrain.config.schema import Experiment, PrecisionConfig, RuntimeConfig
from hunyuan_pretrain.diagnostics.parity_run import in_processes
from hunyuan_pretrain.model.fp8.quantise import to_fp32
from hunyuan_pretrain.model.fp8.session import matmuls
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
from hunyuan_pretrain.train.optimizer import complete_gradients, gather_parameters
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import compute_gradients, sum_over_batch, train_step


@dataclass
class WeightError:
    """Effect of the recipe on the gradient of one weight, averaged over the steps."""

    name: str
    cosine: float = 0.0
    """Cosine between the gradients with and without the recipe."""
    relative_error: float = 0.0
    """Norm of their difference over the norm of the gradient without the recipe."""
    batch_noise: float = math.nan
    """Norm of the difference of consecutive batches' gradients over sqrt(2) times a gradient's norm; nan with one
    step."""


@dataclass
class OperandLoss:
    """Effect of rounding to FP8 on one operand, over all steps and ranks, as shares of its nonzero values."""

    name: str
    operand: Operand
    saturated: float
    """Share beyond the largest FP8 value by more than half a step."""
    flushed: float
    """Share that became zero."""


@dataclass
class Shadow:
    """The report."""

    recipe: str
    dtype: str
    first_step: int
    losses: list[float] = field(default_factory=list)
    """Loss of each step, trained without the recipe; nats."""
    recipe_losses: list[float] = field(default_factory=list)
    """Losses trained with the recipe."""
    same_weight_losses: list[float] = field(default_factory=list)
    """Losses with the recipe at the weights of the run without it."""
    weights: list[WeightError] = field(default_factory=list)
    """Worst first."""
    operands: list[OperandLoss] = field(default_factory=list)
    """Worst first."""
    rerouted: dict[int, float] = field(default_factory=dict)
    """Layer -> share of expert choices that the recipe changes at the same weights, over all steps."""


def shadow_experiment(experiment: Experiment, recipe: str, fp8_format: str | None, folder: Path) -> Experiment:
    """`experiment` under `recipe`, emulated, with `folder` as its run_dir.

    If the experiment already has this recipe, its settings are kept. Raises ConfigError.
    """
    precision = experiment.precision.model_dump()
    if experiment.precision.fp8_recipe != recipe:
        precision |= dict.fromkeys(("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_format"))
    precision |= {"fp8_recipe": recipe} | ({"fp8_format": fp8_format} if fp8_format else {})
    precision["fp8_parameters"] = False  # they do not change any step, and not every recipe has them
    changed = experiment.model_copy(
        update={
            "run_dir": str(folder),
            "precision": PrecisionConfig.model_validate(precision),
            "runtime": RuntimeConfig.model_validate(experiment.runtime.model_dump() | {"transformer_engine": "never"}),
            "evaluation": experiment.evaluation.of_nothing(),
            "logging": experiment.logging.model_copy(update={"wandb": "disabled", "tensorboard": False}),
        }
    )
    rules.check(changed, source=f"{experiment.name} under {recipe}")
    return changed


def run_shadow(
    experiment: Experiment, recipe: str, fp8_format: str | None, steps: int, output: Path | None
) -> Shadow | None:
    """Run `shadow` in the job's ranks under torchrun, otherwise in as many processes on this machine as the experiment
    needs.

    Returns the report on rank 0 and writes it to `output` as JSON; returns None elsewhere. Raises ConfigError before
    anything runs if the folder of `output` does not exist.
    """
    if output is not None and not output.parent.is_dir():
        raise ConfigError(
            "shadow", [Problem("--output", str(output), f"{output.parent} is not a folder", "choose another")]
        )
    shadow_experiment(
        experiment, recipe, fp8_format, Path(experiment.run_dir)
    )  # refused here, before any process starts
    if "RANK" in os.environ:
        report = shadow(experiment, recipe, fp8_format, steps)
    else:
        ranks = experiment.parallel.world_size or smallest_world_size(experiment)
        report = in_processes(ranks, shadow, experiment, recipe, fp8_format, steps)
    if report is not None and output is not None:
        output.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def shadow(experiment: Experiment, recipe: str, fp8_format: str | None, steps: int) -> Shadow | None:
    """Run both passes in the ranks of this job. Returns the report on rank 0, None elsewhere. Writes nothing to the
    experiment's run_dir.

    Communicates: all groups, in every step. Raises ConfigError, DataFormatError or CheckpointError as training does.
    """
    with tempfile.TemporaryDirectory(prefix="hunyuan_shadow_") as folder:
        borrow_checkpoints(Path(experiment.run_dir), Path(folder))
        changed = shadow_experiment(experiment, recipe, fp8_format, Path(folder))
        report = Shadow(recipe, experiment.precision.dtype, 0)
        run = setup.prepare(changed)
        report.first_step = run.first_step
        if run.first_step >= run.loader.num_steps:
            rule = f"has no step left: {run.first_step} of {run.loader.num_steps} are done"
            raise ConfigError(
                "shadow",
                [Problem("run_dir", experiment.run_dir, rule, "choose another run_dir to start from the beginning")],
            )
        numbers = range(run.first_step, min(run.first_step + steps, run.loader.num_steps))
        for step in numbers:
            report.recipe_losses.append(_train(run, step, in_fp8=True))
        setup.leave(run)
        run = setup.prepare(changed)
        comparison = _Comparison(run)
        for step in numbers:
            report.same_weight_losses.append(comparison.take_with_recipe(step))
            report.losses.append(_train(run, step, in_fp8=False, before_update=comparison.take_without))
        report.weights, report.operands = comparison.weights(), comparison.operands()
        report.rerouted = comparison.rerouted()
        is_first = dist.get_rank() == 0
        setup.leave(run)
    return report if is_first else None


def borrow_checkpoints(run_dir: Path, folder: Path) -> None:
    """Let a run in `folder` start from the checkpoints of `run_dir` without being able to rename or remove them.

    Links each checkpoint separately, not their folder: the run would remove a checkpoint that a training in progress
    is still writing there, as a leftover.
    """
    (folder / "checkpoints").mkdir()
    for found in named_checkpoints(run_dir.absolute()):
        (folder / "checkpoints" / found.name).symlink_to(found)
    if (run_dir / LEDGER).exists():  # which of them may be used, and without which data
        shutil.copy2(run_dir / LEDGER, folder / LEDGER)


def _train(run: Run, step: int, in_fp8: bool, before_update: Any = None) -> float:
    apply_learning_rate(run, step)
    result = train_step(run, run.schedule.stage(step), step, before_update=before_update, in_fp8=in_fp8)
    gather_parameters(run.wrapped)
    return result.loss


def count_lost(scaled: Tensor, values: Tensor) -> Tensor:
    """float64 counts of nonzero values, of saturated values, and of values that become zero. `values` is `scaled` in
    FP8."""
    largest = torch.finfo(values.dtype).max
    # the largest value of E4M3 is 1.75 * 2^8, of E5M2 1.75 * 2^15, and half a step there 2^4 or 2^12
    half_step = largest / (28 if values.dtype == torch.float8_e4m3fn else 14)
    is_there = scaled != 0
    found = is_there.sum(), (scaled.abs() > largest + half_step).sum(), (is_there & (to_fp32(values) == 0)).sum()
    return torch.stack(found).double().cpu()


class _Comparison:
    """Compares gradients with and without the recipe, at the same weights and on the same batches."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._with_recipe: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._steps: list[dict[str, tuple[float, ...]]] = []
        self._counts: dict[tuple[str, Operand], Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
        self._experts: dict[int, list[Tensor]] = defaultdict(list)
        self._experts_with_recipe: dict[int, list[Tensor]] = {}
        self._rerouted: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        for name, matmul in matmuls(run.chunks):
            matmul.watch = self._count_of(name)
        for model in run.chunks:
            for layer in model.decoder.layers:
                layer.mlp.router.register_forward_hook(self._keep_experts_of(layer.layer))

    def _keep_experts_of(self, layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            self._experts[layer].append(output.plan.experts_TK(self._run.experiment.model.num_moe_experts))

        return keep

    def _take_experts(self) -> dict[int, list[Tensor]]:
        """Return the experts recorded for every micro-batch of a pass, by layer, and clear the record."""
        found, self._experts = self._experts, defaultdict(list)
        return found

    def _count_of(self, name: str) -> Any:
        def count(operand: Operand, scaled: Tensor, values: Tensor) -> None:
            self._counts[name, operand] += count_lost(scaled, values)

        return count

    def take_with_recipe(self, step: int) -> float:
        """Keep a batch's gradients under the recipe and return its loss. Weights are not updated."""
        run = self._run
        found = compute_gradients(run, run.schedule.stage(step), step)
        self._with_recipe, self._experts_with_recipe = self._gradients(), self._take_experts()
        losses, _ = sum_over_batch(run.groups, [loss.reshape(1) for loss in found.losses], 1, found.statistics)
        return losses[0].item()

    def take_without(self) -> None:
        """Compare the kept gradients with those now in the buffers, which were computed without the recipe."""
        gradients = self._gradients()
        for layer, experts in self._take_experts().items():
            for plain_TK, with_recipe_TK in zip(experts, self._experts_with_recipe[layer], strict=True):
                self._rerouted[layer] += torch.tensor(
                    [int((plain_TK != with_recipe_TK).sum()), plain_TK.numel()], dtype=torch.float64
                )
        step = {}
        for name, exact in gradients.items():
            with_recipe, before = self._with_recipe[name].double().flatten(), self._before.get(name)
            exact = exact.double().flatten()
            noise = (
                (exact - before.double().flatten()).square().sum() if before is not None else exact.new_tensor(math.nan)
            )
            sums = (
                exact @ with_recipe,
                exact @ exact,
                with_recipe @ with_recipe,
                (exact - with_recipe).square().sum(),
                noise,
            )
            step[name] = tuple(float(value) for value in sums)
        self._steps.append(step)
        self._before = gradients

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients of the weights whose first replica is on this rank, so that each weight counts once."""
        complete_gradients(self._run.wrapped)
        found = {}
        for model in self._run.chunks:
            placements = model.placements()
            for name, parameter in model.named_parameters():
                if placements[name].replica == (0, 0, 0):
                    found[name] = parameter.main_grad.clone()
        return found

    def weights(self) -> list[WeightError]:
        """Errors of every weight of the whole model, worst cosine first. Communicates: all ranks."""
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self._steps)
        found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for step in zip(*ranks, strict=True):
            totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
            for rank in step:
                for name, sums in rank.items():
                    totals[name] = [total + value for total, value in zip(totals[name], sums, strict=True)]
            for name, (dot, exact, with_recipe, error, noise) in totals.items():
                if exact > 0:
                    cosine = dot / math.sqrt(exact * with_recipe) if with_recipe > 0 else 0.0
                    found[name].append((cosine, math.sqrt(error / exact), math.sqrt(noise / (2 * exact))))
        rows = []
        for name, values in found.items():
            cosines, errors, noises = zip(*values, strict=True)
            later = [noise for noise in noises if not math.isnan(noise)]
            mean_noise = sum(later) / len(later) if later else math.nan
            rows.append(WeightError(name, sum(cosines) / len(cosines), sum(errors) / len(errors), mean_noise))
        return sorted(rows, key=lambda row: row.cosine)

    def rerouted(self) -> dict[int, float]:
        """Layer -> share of expert choices that differ. Communicates: all ranks."""
        return {
            layer: (counts[0] / counts[1]).item() for layer, counts in sorted(_sum_over_ranks(self._rerouted).items())
        }

    def operands(self) -> list[OperandLoss]:
        """Losses of every quantised operand, largest lost share first. Communicates: all ranks."""
        rows = []
        for (name, operand), counts in _sum_over_ranks(self._counts).items():
            total, saturated, flushed = counts.tolist()
            rows.append(OperandLoss(name, operand, saturated / max(total, 1), flushed / max(total, 1)))
        return sorted(rows, key=lambda row: row.saturated + row.flushed, reverse=True)


def _sum_over_ranks(mine: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Sum over all ranks for each key. Communicates: all ranks."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dict(mine))
    totals: dict[Any, Tensor] = {}
    for rank in ranks:
        for key, value in rank.items():
            totals[key] = totals[key] + value if key in totals else value
    return totals


def table(report: Shadow, longest: int = 12) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The report as (title, rows) tables; `longest` limits the rows for weights and for operands."""
    losses = [
        (
            f"{report.first_step + number + 1}",
            f"{plain:.4f}",
            f"{trained:.4f}",
            f"{trained - plain:+.4f}",
            f"{same - plain:+.5f}",
        )
        for number, (plain, trained, same) in enumerate(
            zip(report.losses, report.recipe_losses, report.same_weight_losses, strict=True)
        )
    ]
    weights = [
        (
            row.name,
            f"{row.cosine:.5f}",
            f"{row.relative_error:.4f}",
            f"{row.batch_noise:.3f}" if report.losses[1:] else "",
        )
        for row in report.weights[:longest]
    ]
    operands = [
        (row.name, row.operand, f"{row.saturated:.3%}", f"{row.flushed:.3%}") for row in report.operands[:longest]
    ]
    header = ("step", report.dtype, report.recipe, "gap", "gap at the same weights")
    return [
        ("loss", [header, *losses]),
        ("gradients, worst first", [("weight", "cosine", "relative error", "batch noise"), *weights]),
        (
            "tokens sent to another expert",
            [("layer", "share"), *((str(layer), f"{share:.3%}") for layer, share in report.rerouted.items())],
        ),
        ("quantised operands, worst first", [("layer", "operand", "saturated", "flushed to zero"), *operands]),
    ]


def conclusion(report: Shadow) -> str:
    """One sentence of figures, without a verdict."""
    gaps = [trained - plain for plain, trained in zip(report.losses, report.recipe_losses, strict=True)]
    worst, steps = report.weights[0], len(gaps)
    noisiest = max(
        (row.relative_error / row.batch_noise for row in report.weights if row.batch_noise > 0), default=math.nan
    )
    text = f"{report.recipe} against {report.dtype}, {steps} steps: loss {gaps[-1]:+.4f} in the last step, "
    text += f"{sum(gaps) / steps:+.4f} on average; smallest gradient cosine {worst.cosine:.4f} ({worst.name})"
    return text + ("" if math.isnan(noisiest) else f"; gradient errors are at most {noisiest:.2f} of the batch noise")
