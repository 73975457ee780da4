"""Rules of the resilience settings: what can be judged, rolled back to and computed twice."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment


def spikes_have_a_limit(experiment: Experiment) -> Iterator[Problem]:
    """A policy for spikes needs a number to watch; a norm of the update can be computed on the device only."""
    settings, name = experiment.resilience, "resilience.spike_update_norm_sigmas"
    limits = (settings.spike_loss_sigmas, settings.spike_grad_norm_sigmas, settings.spike_update_norm_sigmas)
    if settings.on_spike is not None and all(limit is None for limit in limits):
        rule = "without spike_loss_sigmas, spike_grad_norm_sigmas and spike_update_norm_sigmas there are no spikes"
        yield Problem("resilience.on_spike", settings.on_spike, rule, "set one of them, or this to null")
    if settings.spike_update_norm_sigmas is None:
        return
    value, offloaded = settings.spike_update_norm_sigmas, experiment.optimizer.cpu_offload_fraction
    if settings.on_spike is None:
        yield Problem(name, value, "without on_spike it is not computed", "set resilience.on_spike, or this to null")
    if offloaded > 0:
        rule = f"optimizer.cpu_offload_fraction={offloaded:g}: moments are on the host, and would have to be read twice"
        yield Problem(name, value, rule, "set this to null; spike_grad_norm_sigmas still applies")


def a_roll_back_finds_a_checkpoint(experiment: Experiment) -> Iterator[Problem]:
    """Checkpoints old enough must be kept."""
    settings, checkpoint = experiment.resilience, experiment.checkpoint
    if not settings.rolls_back:
        return
    key = "resilience.on_nonfinite" if settings.on_nonfinite == "rollback" else "resilience.on_spike"
    if checkpoint.save_every_steps is None:
        rule = "checkpoint.save_every_steps=null saves only the end of the run: there is nothing to go back to"
        yield Problem(key, "rollback", rule, "set checkpoint.save_every_steps, or this to skip")
        return
    if checkpoint.keep_last is None:
        return
    needed = 1 + -(-(settings.rollback_steps - 1) // checkpoint.save_every_steps)
    if checkpoint.keep_last < needed:
        rule = (
            f"a roll-back by resilience.rollback_steps={settings.rollback_steps} needs the last {needed} checkpoints "
            f"with checkpoint.save_every_steps={checkpoint.save_every_steps}"
        )
        yield Problem("checkpoint.keep_last", checkpoint.keep_last, rule, f"set it to at least {needed}")


def a_step_can_be_computed_twice(experiment: Experiment) -> Iterator[Problem]:
    """Two computations must agree bit by bit, and a rank's own gradients must be seen before they are reduced."""
    every = experiment.resilience.rerun_every
    if every is None:
        return
    key = "resilience.rerun_every"
    if not experiment.runtime.deterministic:
        rule = "runtime.deterministic=false allows operations that give other bits when they are repeated"
        yield Problem(key, every, rule, "set runtime.deterministic=true, or this to null")
    if experiment.runtime.cuda_graphs:
        rule = "runtime.cuda_graphs=true: a recorded step holds its reductions, so a rank's own gradients are not seen"
        yield Problem(key, every, rule, "set runtime.cuda_graphs=false, or this to null")


RESILIENCE_RULES = (spikes_have_a_limit, a_roll_back_finds_a_checkpoint, a_step_can_be_computed_twice)
