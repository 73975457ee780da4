"""How a save and a load grow with the ranks of a job, apart from the tensors: index, marker, plan and open files.

    python tests/benchmarks/checkpoint_growth.py [CONFIG] [--ranks 64 256 1024 2048]

The layout is that of CONFIG; only data parallelism grows. How it is computed: tests/helpers/checkpoint_growth.py. Times
are seconds of one core. One line of JSON per number of ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = "configs/pretrain/hunyuan_large_h20x2048.yaml"


def main() -> None:
    """Print the table as JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 2048])
    arguments = parser.parse_args()

    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()
    sys.path.insert(0, str(ROOT))

    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.diagnostics.dry_run import as_it_runs
    from tests.helpers.checkpoint_growth import measure

    for world_size in arguments.ranks:
        experiment = as_it_runs(load_experiment(Path(arguments.config), [f"parallel.world_size={world_size}"]))
        print(json.dumps(measure(experiment, world_size)), flush=True)


if __name__ == "__main__":
    main()
