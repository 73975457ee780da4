"""A run whose ranks are killed (kill -9) at random moments, many times: is its loss curve that of an undisturbed run?

python -m tests.benchmarks.kills [--kills 20] [--ranks 2] [--seed 1]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.helpers.runs import make_corpus
from tests.parallel.test_restarts import killed_at_random, losses, undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("kills", 20), ("ranks", 2), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        corpus, steps = make_corpus(folder / "corpus"), 2 * options.kills + 8
        when = killed_at_random(corpus, folder, options.kills, options.ranks, options.seed, steps)
        same = losses(folder / "killed") == undisturbed(corpus, folder, options.ranks, steps)
        print("; ".join(when))
        print(
            f"{options.kills} kills of one of {options.ranks} ranks in {steps} steps, "
            f"{time.monotonic() - began:.0f} s: {'bitwise the same' if same else 'ANOTHER'} loss curve"
        )
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
