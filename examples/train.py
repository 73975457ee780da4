"""Train an experiment from Python, as `hunyuan-pretrain train` does on one rank.

    python examples/train.py configs/dev/demo_cpu.yaml parallel.world_size=1 parallel.expert_model_parallel_size=1

For several ranks, start it with torchrun; each rank then runs this file.
"""

from __future__ import annotations

import os
import sys

from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.runtime.environment import prepare


def main(config: str, *overrides: str) -> int:
    """Returns 0, or 75 after a SIGTERM: saved, and ready to be started again."""
    # Frozen, checked, every default filled in; a mistake is a ConfigError that lists all of them.
    experiment = load_experiment(config, overrides, int(os.environ.get("WORLD_SIZE", "1")))
    print(f"{experiment.name}: {sum(stage.num_steps for stage in experiment.stages)} steps")
    # CUDA and torch read some of their settings from the environment when they are imported, so this comes first. It
    # also makes megatron-core work where there is no GPU.
    prepare(experiment)

    from hunyuan_pretrain.train.loop import train

    return train(experiment)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
