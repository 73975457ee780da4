"""What the marks of where a rank is (hunyuan_pretrain/parallel/whereabouts.py) cost a training step of a tiny model,
where they weigh most: steps with and without them alternate in one run. Times are of the training thread on a core, so
that other work on the machine matters less.

python -m tests.benchmarks.whereabouts [--steps 200]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hunyuan_pretrain.runtime import cpu_megatron
from tests.helpers.runs import experiment_fields, make_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    num_steps = parser.parse_args().steps
    cpu_megatron.install()
    from hunyuan_pretrain.parallel import whereabouts
    from hunyuan_pretrain.train.step import train_step
    from tests.helpers.one_rank import on_this_rank

    torch.set_num_threads(1)
    functions = {name: getattr(whereabouts, name) for name in ("phase", "forward", "backward")}
    hook = torch.Tensor.register_hook

    def nothing(*arguments: Any) -> None:
        """In place of a function that is left out."""

    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name) / "corpus")
        run = on_this_rank(experiment_fields(corpus, Path(name) / "run", num_steps + 1))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        marks = 0
        for step in range(num_steps):
            is_noted = step % 4 in (1, 2)  # neither always after the other
            for name_of, function in functions.items():
                setattr(whereabouts, name_of, function if is_noted else nothing)
            torch.Tensor.register_hook = hook if is_noted else nothing
            last, began = whereabouts.place(), time.thread_time()
            train_step(run, run.schedule.stage(step), step)
            seconds[is_noted].append(time.thread_time() - began)
            if is_noted:
                marks = next(n for n, mark in enumerate(reversed(whereabouts._marks)) if mark is last)
        torch.Tensor.register_hook = hook
        run.loader.close()
    with_notes, without = (statistics.median(sorted(seconds[one])) for one in (True, False))
    began = time.thread_time()
    for _ in range(100_000):
        functions["forward"](1)
    each = (time.thread_time() - began) / 100_000
    print(
        f"{marks} marks a step of {1e3 * without:.2f} ms (median of {len(seconds[False])}); with marks "
        f"{with_notes / without:.4f} of that; a mark takes {1e6 * each:.2f} us, "
        f"{100 * marks * each / without:.3f}% of the step"
    )


if __name__ == "__main__":
    main()
