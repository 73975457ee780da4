"""A run of one rank inside the test process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.run import Run
from tests.helpers.tiny import world_of_one


def on_this_rank(fields: dict[str, Any]) -> Run:
    """A run of one rank inside the test process, with fresh weights and a log that writes nothing."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # core keeps this on the class; a backward pass outside its schedules, as in tests of the model, reshapes it
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    experiment, groups = Experiment.model_validate(fields), world_of_one()
    setup.use_deterministic_algorithms(True)
    chunks, wrapped = setup._build_model(experiment, groups)
    optimizer = setup.build_optimizer(wrapped, experiment, groups)
    loader, evaluation, sets = setup._open_data(experiment, groups)
    log = RunLog(Path(experiment.run_dir), experiment.logging, experiment.name, is_writer=False)
    return Run(
        experiment,
        torch.device("cpu"),
        groups,
        chunks,
        wrapped,
        optimizer,
        loader,
        evaluation,
        0,
        log,
        evaluation_sets=sets,
    )


def moments(run: Run) -> dict[str, np.ndarray]:
    """Both Adam moments and the update count of each tensor of this rank's optimizer, in the optimizer's order; empty
    before the first step."""
    found: dict[str, np.ndarray] = {}
    for part, optimizer in enumerate(run.optimizer.chained_optimizers):
        for number, parameter in enumerate(chain(*(group["params"] for group in optimizer.optimizer.param_groups))):
            state = optimizer.optimizer.state.get(parameter, {})
            found |= {f"{part}/{number}/{key}": value.detach().float().numpy().copy() for key, value in state.items()}
    return found
