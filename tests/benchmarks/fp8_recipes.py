"""Final losses of every FP8 recipe, emulated, compared with BF16 and with the noise between seeds.

    make demo                                   # its text, tokenizer and packed data
    python tests/benchmarks/fp8_recipes.py [--seeds 3] [--output fp8_out] [KEY=VALUE]...

Trains configs/dev/fp8_comparison.yaml for every seed in BF16 and under each recipe. A seed determines the weights, the
order of the data and the recycling, so runs of one seed differ only in the recipe. Prints a table and writes it, with a
plot of the gaps to BF16. A run whose result exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs/dev/fp8_comparison.yaml"
RECIPES = ("bf16", "delayed", "tensorwise", "blockwise", "mxfp8")
LAST_STEPS = 10
"""Training loss is the mean over these steps."""


def train(recipe: str, seed: int, output: Path, overrides: list[str]) -> dict[str, list[float] | float]:
    """Losses of one run: at every step, and on held-out text at the end."""
    run_dir = output / f"{recipe}_{seed}"
    result = output / f"{recipe}_{seed}.json"
    if not result.exists():
        settings = [
            f"seed={seed}",
            f"run_dir={run_dir}",
            f"precision.fp8_recipe={'null' if recipe == 'bf16' else recipe}",
            *overrides,
        ]
        subprocess.run(
            [sys.executable, "-m", "hunyuan_pretrain", "train", str(CONFIG), *settings],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        heldout = next(record["validation_loss"] for record in reversed(records) if "validation_loss" in record)
        result.write_text(json.dumps({"losses": losses, "heldout": heldout}))
    return json.loads(result.read_text())


def mean_and_spread(values: list[float]) -> str:
    """Mean, and standard deviation of a single value."""
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def rows_of(results: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    """(recipe, training loss, held-out loss, gaps to BF16 of the same seed)."""
    rows = [("recipe", f"loss, last {LAST_STEPS} steps", "held-out loss", "gap of the same seed", "held-out gap")]
    for recipe, runs in results.items():
        last = [statistics.mean(run["losses"][-LAST_STEPS:]) for run in runs]
        heldout = [run["heldout"] for run in runs]
        plain = results["bf16"]
        gaps = [value - statistics.mean(run["losses"][-LAST_STEPS:]) for value, run in zip(last, plain, strict=True)]
        heldout_gaps = [value - run["heldout"] for value, run in zip(heldout, plain, strict=True)]
        shown = ("", "") if recipe == "bf16" else (mean_and_spread(gaps), mean_and_spread(heldout_gaps))
        rows.append((recipe, mean_and_spread(last), mean_and_spread(heldout), *shown))
    return rows


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Plot each recipe's gap to BF16 by step, mean over the seeds; grey: the distance of single BF16 seeds from their
    mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = range(1, len(results["bf16"][0]["losses"]) + 1)
    by_step = list(zip(*(run["losses"] for run in results["bf16"]), strict=True))
    spread = [statistics.stdev(losses) if len(losses) > 1 else 0.0 for losses in by_step]
    axes.fill_between(
        steps, [-value for value in spread], spread, color="0.85", label="bf16, standard deviation of seeds"
    )
    for recipe in RECIPES[1:]:
        pairs = [
            zip(run["losses"], plain["losses"], strict=True)
            for run, plain in zip(results[recipe], results["bf16"], strict=True)
        ]
        gaps = [statistics.mean(row) for row in zip(*([a - b for a, b in pair] for pair in pairs), strict=True)]
        axes.plot(steps, gaps, label=recipe, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss over bf16's, nats")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("fp8_out"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {recipe: [] for recipe in RECIPES}
    for seed in range(1, options.seeds + 1):
        for recipe in RECIPES:
            results[recipe].append(train(recipe, seed, options.output, options.overrides))
            print(f"seed {seed}, {recipe}: held-out loss {results[recipe][-1]['heldout']:.4f}", flush=True)
    text = "\n".join("  ".join(f"{cell:<24}" for cell in row).rstrip() for row in rows_of(results))
    print(text)
    (options.output / "table.txt").write_text(text + "\n")
    plot(results, options.output / "gaps.png")


if __name__ == "__main__":
    main()
