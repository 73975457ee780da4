"""What takes time beside training steps: validation, saving, and what failures cost.

Not modelled: reading checkpoints and data at a start, which `restart_s` of the hardware includes; storage that other
jobs use at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hunyuan_pretrain.config.derived import stages_of
from hunyuan_pretrain.config.schema import EvaluationConfig
from hunyuan_pretrain.plan.buffers import buffers_of_stage
from hunyuan_pretrain.plan.counts import checkpoint_bytes
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.passes import Job, passes_of_stages

SAVED_BYTES = 14
"""Of a bf16 weight in a checkpoint: itself, and main weight and two moments in fp32."""


@dataclass(frozen=True)
class Beside:
    """What interrupts the steps of a stage."""

    validation_s: float | None
    """Of one validation on all sets; 0 without sets. None: a set has no max_sequences, so its data decides."""
    save_s: float
    """Of one checkpoint; training waits for it."""
    saved_bytes: int
    """Size of a checkpoint."""
    validation_share: float
    """Seconds of validation for each second of training."""
    save_share: float
    """The same of saving."""
    interval_s: float
    """Between two checkpoints."""

    @property
    def share(self) -> float:
        """Of both."""
        return self.validation_share + self.save_share


def beside_steps(job: Job, step_s: float) -> Beside:
    """Beside steps of `step_s` seconds in the job's stage. Raises as `passes.passes_of_stages`."""
    experiment, steps = job.experiment, job.stage.num_steps
    saved = checkpoint_bytes(experiment)
    validation, save = validation_s(job), save_s(job, saved)
    every = min(experiment.evaluation.every_steps, steps)
    interval = min(experiment.checkpoint.save_every_steps or steps, steps)
    return Beside(
        validation,
        save,
        saved,
        (validation or 0.0) / (every * step_s),
        save / (interval * step_s),
        interval * step_s,
    )


def save_s(job: Job, saved: int) -> float:
    """Each rank copies its share to the host, then all servers write at once."""
    experiment, ranks, hardware = job.experiment, job.ranks, job.hardware
    servers = -(-ranks.world_size // hardware.node_gpus)
    copied = 0.0
    for rank in range(ranks.pp):
        share = 0.0
        for chunk in stages_of(experiment.model, experiment.parallel, rank):
            parts = experiment.model, experiment.parallel, experiment.precision, ranks.world_size, chunk
            share += sum(buffer.size / buffer.num_ranks for buffer in buffers_of_stage(*parts))
        copied = max(copied, share * SAVED_BYTES)
    return copied / hardware.host_copy_bytes_per_s + saved / (servers * hardware.storage_bytes_per_s)


def sequences_of(evaluation: EvaluationConfig) -> list[int | None]:
    """Sequences of each validation set; None: all that its data has."""
    whole = [evaluation.max_sequences] if evaluation.data is not None else []
    return whole + [one.max_sequences or evaluation.max_sequences for one in evaluation.sets]


def validation_s(job: Job) -> float | None:
    """Of one validation on all sets: forward passes in bf16 without a capacity, on sequences as long as the stage's.
    None if the number of sequences is the data's."""
    evaluation, ranks = job.experiment.evaluation, job.ranks
    sets = sequences_of(evaluation)
    if not sets:
        return 0.0
    forward = _forward_s(job)
    is_interleaved = len(forward) > ranks.pp
    seconds = 0.0
    for sequences in sets:
        if sequences is None:
            return None
        micro_batches = -(-sequences // (ranks.dp * evaluation.micro_batch_sequences))
        if is_interleaved:  # the schedule takes as many micro-batches in turn as there are ranks
            micro_batches = -(-micro_batches // ranks.pp) * ranks.pp
        seconds += pipelined_s(forward, ranks.pp, micro_batches)
    return seconds


def _forward_s(job: Job) -> list[float]:
    """Of a validation micro-batch in each pipeline stage."""
    experiment, size = job.experiment, job.experiment.evaluation.micro_batch_sequences
    changes = {
        "model": experiment.model.model_copy(update={"moe_expert_capacity_factor": None, "recycle_routing": False}),
        "precision": experiment.precision.model_copy(update={"fp8_recipe": None, "fp8_parameters": False}),
        # nothing is kept for a backward pass
        "parallel": experiment.parallel.model_copy(update={"cpu_offloading_num_layers": 0}),
        "runtime": experiment.runtime.model_copy(update={"cuda_graphs": False}),
    }
    dropless, stage = (
        experiment.model_copy(update=changes),
        job.stage.model_copy(update={"micro_batch_sequences": size}),
    )
    stages = passes_of_stages(replace(job, experiment=dropless, stage=stage))
    seconds = [sum(each.forward.values()) for each in stages]
    # in training the loss computes the gradients of the output layer too, two matmuls as large as that of the logits
    seconds[-1] -= stages[-1].forward["output layer"] * 2 / 3
    return seconds


def pipelined_s(forward: list[float], ranks: int, micro_batches: int) -> float:
    """Until the last micro-batch has passed the last stage, without messages. The rank that computes longest never
    waits once it has begun, and what it sends last passes the stages after its own."""
    return max(
        sum(forward[:rank])
        + micro_batches * sum(forward[rank::ranks])
        + sum(forward[len(forward) - ranks + rank + 1 :])
        for rank in range(ranks)
    )


@dataclass(frozen=True)
class Failures:
    """What unexpected interruptions cost a run."""

    count: float
    lost_s: float
    """By each: half of what lies between two checkpoints, and a restart."""

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.count * self.lost_s


def failures(seconds: float, interval_s: float, world_size: int, hardware: Hardware) -> Failures:
    """Of a run of `seconds`, with `interval_s` between checkpoints. What happens while steps are repeated is left
    out."""
    count = seconds / 3600 * world_size / hardware.gpu_hours_between_failures
    return Failures(count, interval_s / 2 + hardware.restart_s)
