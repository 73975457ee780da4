"""Compares two layouts of one experiment tensor by tensor, for `hunyuan-pretrain parity` and the equality tests.

Both layouts start from the same weights (a function of the seed) and read the same batches. Everything that a layout
computes is assembled into whole tensors and compared: losses, the gradient norm, every gradient before clipping, and
every parameter and moment after the update. Of every module's output, a fingerprint per token is compared, which finds
the first module that differs.

The expert of every token, a decision and not a sum, must be equal; copies of a tensor on several ranks must be bitwise
identical. Everything else is a sum whose order depends on the layout, and is compared within TOLERANCE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.checkpoint.optimizer_state import full_moments
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.rounding import rounding_noise
from hunyuan_pretrain.model.experts import RoutedExperts
from hunyuan_pretrain.model.fp8.parameters import unquantised
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.permutation import sum_of_rows
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.model.routing import TrainingRouting
from hunyuan_pretrain.parallel.sharding import Placement
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
from hunyuan_pretrain.train.metrics import step_record
from hunyuan_pretrain.train.optimizer import complete_gradients, gather_parameters
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import train_step

TOLERANCE = 2e-5
"""Largest allowed fp32 difference, relative to a tensor's largest entry: layouts differ only in summation order. All
comparisons of layouts use it. 2e-5 is about 170 roundings of 2^-23, what reordering a sum of a few thousand terms
produces."""

SCALARS = ("loss", "balance_loss", "z_loss", "grad_norm", "target_tokens")
MODULES = (
    "embedding",
    "input_layernorm",
    "self_attention",
    "pre_mlp_layernorm",
    "router",
    "experts",
    "shared_experts",
    "layer",
    "final",
)
"""Order of execution inside a layer; `layer` is its output."""
WEIGHTS = ("linear_q", "q_layernorm", "k_layernorm", "linear_proj", "linear_fc1", "linear_fc2")
"""Order of execution inside a module."""


@dataclass
class StepTrace:
    """What one step computed, for the whole model and batch."""

    scalars: dict[str, float] = field(default_factory=dict)
    shares: dict[str, Any] = field(default_factory=dict)
    """Expert load, overflow, recycled and dropped share by layer."""
    routing: dict[str, np.ndarray] = field(default_factory=dict)
    """layer -> (tokens of the global batch, K) expert of each choice, -1 if dropped."""
    choices: dict[str, np.ndarray] = field(default_factory=dict)
    """layer -> (tokens of the global batch, K) likeliest experts, even if another run's choices were used instead."""
    activations: dict[str, np.ndarray] = field(default_factory=dict)
    """module -> (tokens of the global batch, 2): norm and a random projection of its output, for routed experts of the
    sum of a token's rows; (tokens, 0) if the output exists only inside a fused kernel."""
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    """After the update."""
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    """Tensors whose copies on two ranks are not bitwise identical."""


@dataclass(frozen=True)
class Difference:
    """One compared quantity."""

    step: int
    kind: str
    name: str
    relative: float
    """Largest difference over the largest entry of the reference; for bf16 and FP8 see parity_noise."""
    tolerance: float = TOLERANCE

    @property
    def is_within(self) -> bool:
        """Whether summation order can explain the difference."""
        return self.relative <= self.tolerance


def trace_steps(run: Run, steps: range, choices: list[dict[str, np.ndarray]] | None = None) -> list[StepTrace]:
    """Train `steps` as train.loop does and return their traces on rank 0, empty traces elsewhere. Communicates: all
    groups.

    choices: another run's expert choices, one per step; tokens are routed by them.
    """
    traces = []
    for number, step in enumerate(steps):
        experiment = run.experiment
        stage = run.schedule.stage(step)
        rates = apply_learning_rate(run, step)
        gradients: list[_Piece] = []
        watch = _Watch(run, choices[number] if choices else None)
        result = train_step(run, stage, step, before_update=partial(_keep_gradients, run, gradients))
        watch.close()
        gather_parameters(run.wrapped)
        record = step_record(experiment.model, stage, step, result, *rates, 1.0)
        trace = StepTrace(
            scalars={name: float(record[name]) for name in SCALARS if name in record},
            shares={
                name: record[name] for name in ("expert_load", "overflow_share", "recycled_share", "dropped_share")
            },
        )
        weights = [
            piece
            for model, value, placement in _parameters(run)
            for piece in _pieces(placement.name, unquantised(value.detach()), placement, model)
        ]
        _assemble(trace, "gradients", gradients)
        _assemble(trace, "parameters", weights)
        _assemble(trace, "moments", list(_moments(run)))
        for kind in ("activations", "routing", "choices"):
            _assemble_tokens(getattr(trace, kind), getattr(watch, kind), stage.global_batch_tokens)
        traces.append(trace)
    return traces


Measure = Callable[[str, Any, Any], float]
"""(kind, actual, reference) -> size of the difference, infinity if they cannot be compared."""


def compare(actual: list[StepTrace], reference: list[StepTrace], measure: Measure | None = None) -> list[Difference]:
    """Every compared quantity in order of execution: routing and activations forward, gradients backward, then the
    update.

    measure: by default the largest difference over the largest entry.
    """
    measure = measure or (lambda kind, mine, theirs: _difference(mine, theirs))
    found = []
    for step, (mine, theirs) in enumerate(zip(actual, reference, strict=True)):
        found += [Difference(step, "copies", name, float("inf"), 0.0) for name in mine.conflicts]
        forward: list[tuple[str, str, dict[str, Any], dict[str, Any]]]
        seen = [name for name in theirs.activations if not (_is_unseen(mine, name) or _is_unseen(theirs, name))]
        forward = [("activation", name, mine.activations, theirs.activations) for name in seen]
        forward += [("choice", name, mine.choices, theirs.choices) for name in theirs.choices]
        forward += [("routing", name, mine.routing, theirs.routing) for name in theirs.routing]
        rows = sorted(forward, key=lambda row: execution_order(row[1]))
        scalars = [("scalar", name, mine.scalars, theirs.scalars) for name in theirs.scalars]
        rows += [row for row in scalars if row[1] != "grad_norm"]
        backward = sorted(theirs.gradients, key=execution_order, reverse=True)
        rows += [("gradient", name, mine.gradients, theirs.gradients) for name in backward]
        rows += [row for row in scalars if row[1] == "grad_norm"]  # computed from the gradients
        for kind, after, expected in (
            ("moment", mine.moments, theirs.moments),
            ("parameter", mine.parameters, theirs.parameters),
        ):
            rows += [(kind, name, after, expected) for name in expected]
        for kind, name, ours, whole in rows:
            difference = measure(kind, ours.get(name), whole[name])
            found.append(Difference(step, kind, name, difference, 0.0 if kind in ("choice", "routing") else TOLERANCE))
    return found


def execution_order(name: str) -> tuple[int, int, int]:
    """(layer, position in the layer, position in the module) of a module's output, a routing table, or a parameter."""
    layer = re.search(r"layers\.(\d+)", name)
    if layer is None:
        is_first = name.startswith("embedding")
        return (-1, 0, 0) if is_first else (1 << 30, 0, 0)
    inside = [number for number, module in enumerate(MODULES) if f".{module}" in name]
    weights = [number for number, weight in enumerate(WEIGHTS) if f".{weight}" in name]
    return int(layer[1]), inside[0] if inside else MODULES.index("layer"), weights[0] if weights else 0


def _is_unseen(trace: StepTrace, module: str) -> bool:
    return module in trace.activations and trace.activations[module].shape[1] == 0


def _difference(actual: Any, reference: Any) -> float:
    if actual is None or np.shape(actual) != np.shape(reference):
        return float("inf")
    largest = float(np.max(np.abs(reference), initial=0.0))
    difference = float(np.max(np.abs(np.asarray(actual, np.float64) - np.asarray(reference, np.float64)), initial=0.0))
    if np.isnan(difference):
        return float("inf")
    return difference / largest if largest else (float("inf") if difference else 0.0)


# --- collecting -------------------------------------------------------------------------------------------------------

_Piece = tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]
"""(name, shape of the whole tensor, slices of this piece in it, values)."""


def _pieces(name: str, tensor: Tensor, placement: Placement, model: HunyuanModel) -> Iterator[_Piece]:
    for part in placement.parts:
        yield (
            name,
            placement.whole_shape,
            part.whole,
            tensor.view(placement.local_shape)[part.local].float().cpu().numpy().copy(),
        )


def _parameters(run: Run) -> Iterator[tuple[HunyuanModel, torch.nn.Parameter, Placement]]:
    for model in run.chunks:
        placements = model.placements()
        for name, parameter in model.named_parameters():
            yield model, parameter, placements[name]


def _keep_gradients(run: Run, found: list[_Piece]) -> None:
    """Append every reduced gradient of this rank to `found`."""
    complete_gradients(run.wrapped)
    for model, value, placement in _parameters(run):
        if value.requires_grad:  # else it is frozen; main_grad is of core's buffers
            found += _pieces(placement.name, value.main_grad, placement, model)  # type: ignore[attr-defined]


def _moments(run: Run) -> Iterator[_Piece]:
    for _, tensors, placement in full_moments(run.chunks, run.optimizer):
        for kind, tensor in tensors.items():
            yield from _pieces(f"{kind} of {placement.name}", tensor, placement, run.chunks[0])


class _Watch:
    """Hooks that record fingerprints of this rank's module outputs, with the positions of their tokens in the global
    batch."""

    def __init__(self, run: Run, forced: dict[str, np.ndarray] | None = None) -> None:
        self.choices: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._forced = forced
        self._routers: list[Router] = []
        self.activations: list[tuple[str, np.ndarray, np.ndarray]] = []
        self.routing: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._tokens_T: Tensor | None = None
        self._group_tokens = run.experiment.model.moe_routing_group_tokens
        self._num_experts = run.experiment.model.num_moe_experts
        self._hooks = [hook for model in run.chunks for hook in self._register(model)]
        generator = torch.Generator().manual_seed(0)
        self._direction_D = torch.randn(run.experiment.model.hidden_size, generator=generator).to(run.device)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for router in self._routers:
            del router.choose  # restores the method of the class

    def _register(self, model: HunyuanModel) -> Iterator[Any]:
        tp = model.groups.tp

        def begin(module: Any, args: tuple[ModelInputs]) -> None:
            routing = args[0].routing
            assert isinstance(routing, TrainingRouting)
            self._tokens_T = self._tokens_of(routing.share(tp.rank(), tp.size()))

        def end(module: Any, args: Any, output: Any) -> None:
            # layers recomputed in the backward pass are already recorded, and their tokens are no longer known
            self._tokens_T = None

        yield model.register_forward_pre_hook(begin)
        if model.pre_process:
            yield model.embedding.register_forward_hook(self._keep("embedding"))
        for layer in model.decoder.layers:
            prefix = f"decoder.layers.{layer.layer}"
            yield layer.register_forward_hook(self._keep(f"{prefix}.layer"))
            for name in ("input_layernorm", "self_attention", "pre_mlp_layernorm"):
                yield getattr(layer, name).register_forward_hook(self._keep(f"{prefix}.{name}"))
            for name in ("experts", "shared_experts"):
                yield getattr(layer.mlp, name).register_forward_hook(self._keep(f"{prefix}.{name}"))
            yield layer.mlp.router.register_forward_hook(self._keep_routing(f"{prefix}.router"))
            choose = self._choose(f"{prefix}.router", layer.mlp.router.choose)
            layer.mlp.router.choose = choose  # type: ignore[method-assign]  # of this instance, while it is traced
            self._routers.append(layer.mlp.router)
        if model.post_process:
            yield model.decoder.final_layernorm.register_forward_hook(self._keep("final"))
        yield model.register_forward_hook(end)

    def _tokens_of(self, routing: TrainingRouting) -> Tensor:
        offsets = torch.arange(self._group_tokens, device=routing.group_n.device)
        return (routing.group_n[:, None] * self._group_tokens + offsets).reshape(-1)

    def _choose(self, name: str, choose: Any) -> Any:
        def keep(probs_TE: Tensor, routing: TrainingRouting) -> Tensor:
            chosen_TK, tokens_T = choose(probs_TE, routing), self._tokens_of(routing).cpu().numpy()
            if self._tokens_T is not None:
                self.choices.append((name, tokens_T, chosen_TK.cpu().numpy()))
            # use the other run's choices in a recomputation too
            return (
                chosen_TK
                if self._forced is None
                else torch.from_numpy(self._forced[name][tokens_T]).to(chosen_TK.device)
            )

        return keep

    def _keep(self, name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            if self._tokens_T is None:
                return
            if isinstance(module, RoutedExperts):  # its output is rows; its second argument says whose
                output = sum_of_rows(output, args[1])
            hidden_TD = (output[0] if isinstance(output, tuple) else output).detach().float()
            fingerprint_T2 = torch.stack((hidden_TD.norm(dim=1), hidden_TD @ self._direction_D), dim=1)
            if getattr(module, "is_fused", False):  # into the GEMM that follows; what came out here is its input
                fingerprint_T2 = fingerprint_T2[:, :0]
            self.activations.append((name, self._tokens_T.cpu().numpy(), fingerprint_T2.cpu().numpy()))

        return keep

    def _keep_routing(self, name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            if self._tokens_T is None:
                return
            self.routing.append((name, self._tokens_T.cpu().numpy(), output.plan.experts_TK(self._num_experts).numpy()))

        return keep


# --- assembling on rank 0 ---------------------------------------------------------------------------------------------

GATHERED_BYTES = 1 << 30
"""Limit on one gather over all ranks. NCCL gathers into the memory of rank 0's GPU and reserves for each rank as many
bytes as the largest sender has."""


def _gathered(mine: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Yields the pieces of all ranks, part by part, on rank 0; empty lists elsewhere. Communicates: all ranks."""
    parts: list[list[Any]] = [[]]
    num_bytes = 0
    for piece in mine:
        size = sum(values.nbytes for values in piece if isinstance(values, np.ndarray))
        if parts[-1] and num_bytes + size > GATHERED_BYTES // dist.get_world_size():
            parts.append([])
            num_bytes = 0
        parts[-1].append(piece)
        num_bytes += size
    num_parts = [0] * dist.get_world_size()
    dist.all_gather_object(num_parts, len(parts))
    for number in range(max(num_parts)):
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(parts[number] if number < len(parts) else [], found, dst=0)
        yield from found or []


def _assemble(trace: StepTrace, kind: str, mine: list[_Piece]) -> None:
    whole, seen = getattr(trace, kind), {}
    for pieces in _gathered(mine):
        for name, shape, where, values in pieces:
            if name not in whole:
                whole[name], seen[name] = np.zeros(shape, np.float32), np.zeros(shape, bool)
            if seen[name][where].any() and not np.array_equal(whole[name][where], values):
                trace.conflicts.append(f"{kind} of {name}")
            whole[name][where], seen[name][where] = values, True
    for name, is_seen in seen.items():
        assert is_seen.all(), f"no rank holds all of {name}"


def _assemble_tokens(
    whole: dict[str, np.ndarray], mine: list[tuple[str, np.ndarray, np.ndarray]], num_tokens: int
) -> None:
    seen: dict[str, int] = {}
    for rows in _gathered(mine):
        for name, tokens, values in rows:
            if name not in whole:
                whole[name] = np.zeros((num_tokens, values.shape[1]), values.dtype)
            whole[name][tokens] = values
            seen[name] = seen.get(name, 0) + len(tokens)
    for name, count in seen.items():
        assert count == num_tokens, f"{name}: {count} of {num_tokens} tokens were seen"


def trace_layout(
    experiment: Experiment, steps: int, noise: int | None = None, choices: list[dict[str, np.ndarray]] | None = None
) -> list[StepTrace]:
    """`trace_steps` on a fresh run of `experiment` in the ranks of this job, which can run another layout afterwards.

    noise: seed for rounding every matmul differently, see parity_noise. choices: rank 0's are used on all ranks.
    """
    run = setup.prepare(experiment)
    if dist.get_world_size() > 1:  # under torchrun only rank 0 has what another run chose
        shared = [choices]
        dist.broadcast_object_list(shared, src=0)
        choices = shared[0]
    with setup.left_at_the_end(run), nullcontext() if noise is None else rounding_noise(run.chunks, noise):
        return trace_steps(run, range(run.first_step, run.first_step + steps), choices)
