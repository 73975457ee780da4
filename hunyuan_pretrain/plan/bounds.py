"""What a layout takes at least, computed in microseconds: with these bounds a search rules out most layouts before it
looks at one closely.

Unit: a CLA group. A stage of n groups takes n times as long as one group, or longer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import get_args

from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.schema import Experiment, ParallelConfig, Recompute, StageConfig
from hunyuan_pretrain.plan.activations import kept_by_group, kept_by_layer, passes_in_flight
from hunyuan_pretrain.plan.buffers import weights_of_stage
from hunyuan_pretrain.plan.counts import state_bytes
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.layouts import Layout, Pipeline, applied
from hunyuan_pretrain.plan.matmuls import matmuls_of_output_layer
from hunyuan_pretrain.plan.memory import outside
from hunyuan_pretrain.plan.passes import Assumptions, Job, passes
from hunyuan_pretrain.plan.timing import ROUNDING

OF_THE_ENDS = ("output layer", "elementwise", "messages, tp", "waiting for the host")
"""Parts of a stage's time that the embedding and the loss have a share in, or hide."""


REPEATED = {
    "cla_group": ("experts", "attention projections", "router", "attention", "elementwise"),
    "selective": ("experts",),
    "": (),
}
"""Parts of the forward pass that the backward pass repeats as a whole."""


@dataclass(frozen=True)
class _Unit:
    """Seconds of a micro-batch, forward and backward."""

    group: float
    without_waiting: float
    """Of `group`, without waiting for the host."""
    output_layer: float
    """More on the last stage."""
    again: dict[str, float]
    """More with each choice of parallel.recompute, at least."""
    kept: dict[str, int]
    """Bytes of activations that a group keeps with each choice, at least."""


@dataclass(frozen=True)
class _Way:
    """A rank of a pipeline, in CLA groups: those that the first micro-batch passes before it and on the way back, and
    those that the rank computes of each micro-batch."""

    before: int
    own: int
    is_first: bool
    is_last: bool


class Bounds:
    """Of the layouts of one training stage."""

    def __init__(
        self, experiment: Experiment, stage: StageConfig, gpus: int, hardware: Hardware, assumptions: Assumptions
    ) -> None:
        self.experiment, self.stage, self.gpus = experiment, stage, gpus
        self.hardware, self.assumptions = hardware, assumptions
        self._units: dict[Layout, _Unit] = {}
        self._ways: dict[Pipeline, list[_Way]] = {}
        self._waiting: dict[tuple[Pipeline, int], int] = {}
        self._weights: dict[tuple[int, int, int], tuple[int, int, int]] = {}

    def unit(self, layout: Layout) -> _Unit:
        """Of all layouts that differ in the pipeline only."""
        key = layout._replace(pipeline=Pipeline())
        if key not in self._units:
            self._units[key] = self._unit(key)
        return self._units[key]

    def micro_batches(self, layout: Layout) -> int:
        """Of a rank in a step."""
        dp = self.gpus // (layout.tp * layout.cp * layout.pipeline.ranks)
        return self.stage.global_batch_sequences // (dp * layout.micro)

    def seconds(self, layout: Layout, recompute: str) -> float:
        """A step takes at least this long."""
        unit, micro_batches = self.unit(layout), self.micro_batches(layout)
        computing = unit.without_waiting + unit.again[recompute]
        least = 0.0
        for way in self.ways(layout.pipeline):
            groups, loss = way.before + micro_batches * way.own, micro_batches * unit.output_layer * way.is_last
            least = max(least, groups * unit.group, groups * computing + loss)
        return least * (1 - ROUNDING)

    def activation_bytes(self, layout: Layout, recompute: str) -> int:
        """The first pipeline rank keeps at least this while the most micro-batches wait for their backward pass."""
        ranks = layout.pipeline.ranks
        key = layout.pipeline, min(self.micro_batches(layout), 4 * ranks)
        if key not in self._waiting:
            parallel = ParallelConfig.model_construct(**layout.settings(recompute))
            groups = self._groups(layout.pipeline)[::ranks]
            self._waiting[key] = max(
                sum(passes * size for passes, size in zip(state, groups, strict=True))
                for state in set(passes_in_flight(parallel, key[1], 0))
            )
        return self._waiting[key] * self.unit(layout).kept[recompute]

    def ways(self, pipeline: Pipeline) -> list[_Way]:
        """Of the ranks, without those that another one outdoes."""
        if pipeline not in self._ways:
            ranks, groups = pipeline.ranks, self._groups(pipeline)
            found = [
                _Way(sum(groups[:rank]), sum(groups[rank::ranks]), rank == 0, rank == ranks - 1)
                for rank in range(ranks)
            ]
            self._ways[pipeline] = [
                way
                for number, way in enumerate(found)
                if way.is_first or way.is_last or not any(later.own >= way.own for later in found[number + 1 :])
            ]
        return self._ways[pipeline]

    def _groups(self, pipeline: Pipeline) -> list[int]:
        model, number = self.experiment.model, pipeline.ranks * pipeline.chunks
        layers = pipeline.layers or (model.num_layers // number,) * number
        return [size // model.cla_share_factor for size in layers]

    def state_bytes(self, layout: Layout) -> int:
        """A rank keeps at least this between steps, with what is not torch's: buffers without padding, and the mean
        share of the optimizer's state."""
        precision, optimizer = self.experiment.precision, self.experiment.optimizer
        parallel = ParallelConfig.model_construct(**layout.settings("none"))
        ranks = grid(parallel, self.gpus)
        each = (1 if precision.fp8_parameters else 2) + (4 if precision.grad_reduce_in_fp32 else 2)
        state = 0 if optimizer.cpu_offload_fraction else state_bytes(optimizer, 2)
        is_sharded = self.experiment.parallel.use_distributed_optimizer
        dense, routed, embedding = self._weights_of_group(layout)
        most = 0.0
        for way in self.ways(layout.pipeline):
            others = dense * way.own + embedding * (way.is_first or way.is_last)
            mine = others * (each + state / (ranks.dp_cp if is_sharded else 1))
            mine += routed * way.own * (each + state / (ranks.expert_dp if is_sharded else 1))
            most = max(most, mine)
        return int(most) + outside(ranks)

    def _weights_of_group(self, layout: Layout) -> tuple[int, int, int]:
        """Elements of a CLA group on a rank besides routed experts, of those, and of the embedding. Without routers,
        which are in other formats."""
        key = layout.tp, layout.ep, layout.expert_tp
        if key not in self._weights:
            model = self.experiment.model
            one = model.model_copy(update={"num_layers": model.cla_share_factor})
            whole = Layout(layout.tp, ep=layout.ep, expert_tp=layout.expert_tp)
            weights = weights_of_stage(one, ParallelConfig.model_construct(**whole.settings("none")), 0)
            found = [weight for weight in weights if not weight.is_router]
            routed = sum(weight.size for weight in found if weight.is_routed_expert)
            embedding = model.padded_vocab_size * model.hidden_size // layout.tp
            ends = embedding * (1 if model.share_embeddings_and_output_weights else 2) + model.hidden_size
            self._weights[key] = sum(weight.size for weight in found) - routed - ends, routed, embedding
        return self._weights[key]

    def _unit(self, layout: Layout) -> _Unit:
        """From a pipeline with one CLA group in each stage, in which there is one micro-batch."""
        model, precision = self.experiment.model, self.experiment.precision
        groups = model.num_layers // model.cla_share_factor
        made = applied(self.experiment, self.stage, layout._replace(pipeline=Pipeline(groups)))
        parallel = made.parallel.model_copy(update={"cpu_offloading_num_layers": 0})
        made = made.model_copy(update={"parallel": parallel})
        ranks = grid(parallel, groups * math.lcm(layout.tp * layout.cp, layout.ep * layout.expert_tp))
        stage = made.stages[0].model_copy(update={"global_batch_sequences": layout.micro * ranks.dp})
        job = Job(made, stage, ranks, self.hardware, self.assumptions)
        kinds: dict[tuple[bool, ...], int] = {}  # groups in other formats; of each a middle stage, if there is one
        for number in (*range(1, groups - 1), 0, groups - 1):
            layers = range(number * model.cla_share_factor, (number + 1) * model.cla_share_factor)
            kinds.setdefault(tuple(precision.is_fp8_layer(layer, model.num_layers) for layer in layers), number)
        whole, computing = [], []
        again = dict.fromkeys(get_args(Recompute), float("inf"))
        kept = dict.fromkeys(get_args(Recompute), sys.maxsize)
        for number in kinds.values():
            left_out = OF_THE_ENDS if number in (0, groups - 1) else ()
            found = passes(job, number)
            parts = [part for way in found.both for part in way.items() if part[0] not in left_out]
            whole.append(sum(seconds for _, seconds in parts))
            computing.append(sum(seconds for name, seconds in parts if name != "waiting for the host"))
            first = number * model.cla_share_factor
            blocks = [
                kept_by_layer(made, stage, ranks.world_size, layer, self.assumptions.imbalance)
                for layer in range(first, first + model.cla_share_factor)
            ]
            for choice in again:
                words = frozenset(choice.split("+")) - {"none"}
                names = REPEATED["cla_group" if "cla_group" in words else "selective" if "selective" in words else ""]
                more = sum(found.forward.get(name, 0.0) for name in names if name not in left_out)
                again[choice] = min(again[choice], more)
                # what is offloaded to the host is not counted
                size = 0 if self.experiment.parallel.cpu_offloading_num_layers else sum(kept_by_group(blocks, words))
                kept[choice] = min(kept[choice], size)
        logits = matmuls_of_output_layer(model, job.tokens, ranks, job.width)
        loss = sum(
            times * matmul.seconds(self.hardware)
            for one, times in logits
            for matmul in (one, one.input_gradient, one.weight_gradient)
        )
        return _Unit(min(whole), min(computing), loss, again, kept)
