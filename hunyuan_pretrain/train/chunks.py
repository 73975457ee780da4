"""The model of a rank, as the experiment's layout and the machine want it."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.runtime.policy import (
    choose_device,
    fuses_wgrad_accumulation,
    uses_kernels,
    uses_transformer_engine,
)


def build_chunks(experiment: Experiment, groups: ProcessGroupCollection, seed: int | None) -> list[HunyuanModel]:
    """The model chunks of this rank; seed None: their weights are not initialised, because they will be loaded."""
    machine = probe()
    engine, kind = uses_transformer_engine(machine, experiment), choose_device(experiment.runtime.device)
    config = transformer_config(
        experiment.model,
        experiment.parallel,
        experiment.precision,
        fuses_wgrad_accumulation(engine),
        engine,
        kind,
        uses_kernels(machine, experiment),
        experiment.tuning,
    )
    return build_model(config, groups, seed)
