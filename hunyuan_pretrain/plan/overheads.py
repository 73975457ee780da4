"""What takes time beside training steps: validation, saving, steps that are computed twice, and what failures cost.

Not modelled: the wait for the host in each step where steps are judged before their update (resilience.on_nonfinite and
on_spike); that a step which is computed twice does not overlap its reductions; reading checkpoints and data at a start,
which `restart_s` of the hardware includes; storage that other jobs use at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hunyuan_pretrain.config.schema import EvaluationConfig, Experiment
from hunyuan_pretrain.plan.counts import checkpoint_bytes
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.passes import Job, passes_of_stages
from hunyuan_pretrain.plan.saving import bytes_copied


@dataclass(frozen=True)
class Beside:
    """What interrupts the steps of a stage."""

    validation_s: float | None
    """Of one validation on all sets; 0 without sets. None: a set has no max_sequences, so its data decides."""
    save_s: float
    """Of one checkpoint, until it is complete."""
    save_wait_s: float
    """How long training waits for one: until its copy is in the host's memory, and for the save before; without
    checkpoint.async_save, and for the only one of a stage, all the time."""
    saved_bytes: int
    """Size of a checkpoint."""
    validation_share: float
    """Seconds of validation for each second of training."""
    save_share: float
    """The same of saving."""
    interval_s: float
    """Between two checkpoints."""
    late_s: float
    """Training that is done before a checkpoint is complete."""
    rerun_share: float
    """Seconds of second computations (resilience.rerun_every) for each second of training."""
    stop_s: float
    """From a request to stop to a complete checkpoint, at the longest."""

    @property
    def share(self) -> float:
        """Of all."""
        return self.validation_share + self.save_share + self.rerun_share


def beside_steps(job: Job, step_s: float, passes_s: float) -> Beside:
    """Beside steps of `step_s` seconds in the job's stage, of which forward and backward passes take `passes_s`. Raises
    as `passes.passes_of_stages`."""
    experiment, steps = job.experiment, job.stage.num_steps
    saved = checkpoint_bytes(experiment)
    validation, save = validation_s(job), save_s(job, saved)
    every = min(experiment.evaluation.every_steps, steps)
    interval = min(experiment.checkpoint.save_every_steps or steps, steps)
    interval_s, waited = interval * step_s, save
    if experiment.checkpoint.async_save and interval < steps:
        waited = copy_s(job) + max(0.0, save - interval_s)
    return Beside(
        validation,
        save,
        waited,
        saved,
        (validation or 0.0) / (every * step_s),
        waited / interval_s,
        interval_s,
        save - waited,
        passes_s / (step_s * experiment.resilience.rerun_every) if experiment.resilience.rerun_every else 0.0,
        stop_s(experiment, step_s, passes_s, save),
    )


STEPS_TO_STOP = 4
"""On a GPU the host launches a step while the device computes the one before. A request that just misses the launch of
a step is told to all ranks by the next one, and read after one more is launched (train/loop.py)."""


def stop_s(experiment: Experiment, step_s: float, passes_s: float, save: float) -> float:
    """At the longest, from a request to stop to a complete checkpoint: the steps, or the save in flight, then a save.
    Validations and benchmarks are cut short."""
    steps = STEPS_TO_STOP * step_s + (passes_s if experiment.resilience.rerun_every else 0.0)
    before = save if experiment.checkpoint.async_save and experiment.checkpoint.save_every_steps else 0.0
    return max(steps, before) + save


def save_s(job: Job, saved: int) -> float:
    """Each rank copies its share to the host, then all servers write at once."""
    servers = -(-job.ranks.world_size // job.hardware.node_gpus)
    return copy_s(job) + saved / (servers * job.hardware.storage_bytes_per_s)


def copy_s(job: Job) -> float:
    """Of the copy of the state to the host, of the rank that copies the most."""
    ranks = job.ranks
    copied = max(bytes_copied(job.experiment, ranks.world_size, rank) for rank in range(ranks.pp))
    return copied / job.hardware.host_copy_bytes_per_s


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
    """By each: half of what lies between two checkpoints, what is done until one is complete, and a restart."""

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.count * self.lost_s


def failures(seconds: float, interval_s: float, world_size: int, hardware: Hardware, late_s: float = 0.0) -> Failures:
    """Of a run of `seconds`, with `interval_s` between checkpoints, each of which is complete `late_s` of training
    later. What happens while steps are repeated is left out."""
    count = seconds / 3600 * world_size / hardware.gpu_hours_between_failures
    return Failures(count, interval_s / 2 + late_s + hardware.restart_s)
