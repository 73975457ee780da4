"""The `ladder` command: experiments of several sizes trained one after another, and the laws fitted to them."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.exit_status import EXIT_DONE
from hunyuan_pretrain.config.extras import install_hint
from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.ladder_runs import expected, read_runs, recorded, steps_done
from hunyuan_pretrain.diagnostics.scaling_laws import (
    COVERAGE,
    Interval,
    LossLaw,
    Observation,
    PlanLaw,
    ScalingError,
    fit_loss_law,
    fit_plan_law,
    same_tokens,
)
from hunyuan_pretrain.diagnostics.setting_laws import SettingLaw, fit_setting

SETTINGS = (("lr", "compute"), ("batch_tokens", "compute"), ("batch_tokens", "loss"))
"""Settings whose best value is fitted, and against what, where the runs vary them."""
LAW_TITLE = "loss = E + A/N^alpha + B/D^beta, N without embedding"
MOST_SHARE_CHANGE = 2.0
"""Factor by which the embedding's share of the active parameters may vary without a warning."""


@dataclass(frozen=True)
class Rung:
    """An experiment of a ladder."""

    config: Path
    experiment: Experiment
    num_steps: int
    done: int
    """Steps of its newest checkpoint."""

    @property
    def run_dir(self) -> Path:
        return Path(self.experiment.run_dir)

    @property
    def is_finished(self) -> bool:
        return self.done >= self.num_steps

    @property
    def expected(self) -> Observation:
        return expected(self.experiment, self.experiment.name)


def read_ladder(paths: Sequence[Path], overrides: Sequence[str] = ()) -> list[Rung]:
    """The experiments of these files, and of every *.yaml directly in these folders. Raises ConfigError with the
    problems of all of them."""
    problems: list[Problem] = []
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside:
            problems.append(Problem(str(path), Problem.NO_VALUE, "has no *.yaml", "name experiments or their folder"))
        files += inside
    rungs: list[Rung] = []
    owners: dict[Path, Path] = {}
    for file in files:
        try:
            experiment = load_experiment(file, overrides)
        except ConfigError as error:
            problems += [Problem(f"{file}: {one.path}", one.value, one.rule, one.hint) for one in error.problems]
            continue
        run_dir = Path(experiment.run_dir)
        if (other := owners.setdefault(run_dir.absolute(), file)) is not file:
            rule = f"{other} has the same, and would be mixed with it"
            problems.append(Problem(f"{file}: run_dir", experiment.run_dir, rule, "give each experiment its own"))
        rung = Rung(file, experiment, Schedule.of(experiment.stages).num_steps, steps_done(run_dir))
        if rung.is_finished and (trained := recorded(run_dir, experiment.name)) != rung.expected:
            pairs = zip(Observation._fields, trained, rung.expected, strict=True)
            rule = "holds a finished run of other settings: " + ", ".join(
                f"{name} {old:g} instead of {new:g}" for name, old, new in pairs if old != new
            )
            problems.append(Problem(f"{file}: run_dir", experiment.run_dir, rule, "give the experiment its own"))
        rungs.append(rung)
    if problems:
        raise ConfigError("ladder", problems)
    return rungs


def commands(rungs: Sequence[Rung], overrides: Sequence[str] = ()) -> list[str]:
    """A shell script that does what `train_all` does: one line per experiment."""
    lines = []
    for rung in rungs:
        size = rung.expected
        state = "finished" if rung.is_finished else f"{rung.done} of {rung.num_steps} steps done"
        lines.append(f"# {size.name}: {_size(size)}, {size.compute:.3g} FLOPs; {state}")
        if not rung.is_finished:
            lines.append(shlex.join(["launch/train.sh", str(rung.config), *overrides]))
    return lines


def train_all(rungs: Sequence[Rung], overrides: Sequence[str] = ()) -> int:
    """Train the unfinished experiments one after another, each with all ranks of this node, as launch/train.sh does.
    Returns 0, or the exit status of the first that did not finish."""
    for number, rung in enumerate(rungs, start=1):
        place = f"ladder: {number} of {len(rungs)}, {rung.config}"
        if rung.is_finished:
            print(f"{place}: finished", flush=True)
            continue
        print(f"{place}: {rung.done} of {rung.num_steps} steps done", flush=True)
        status = _launch([sys.executable, "-m", "launch.node", str(rung.config), *overrides])
        if status != EXIT_DONE:
            print(f"{place}: ended with status {status}; the same command continues here", file=sys.stderr)
            return status
    return EXIT_DONE


def _launch(command: list[str]) -> int:
    """Run a command to its end, passing on signals that ask to stop. Its own session: a Ctrl-C would otherwise reach it
    twice, and a second one kills it."""
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        children.append(child)
        for number in asked[:1]:  # it came before there was a child
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


# --- the fits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laws:
    """What the runs determine."""

    runs: list[Observation]
    loss: str
    """Name of the loss in metrics.jsonl."""
    law: LossLaw | None
    plan: PlanLaw | None
    """Where N and D grow together, so that there is no `law`."""
    settings: list[SettingLaw]
    reasons: list[str]
    """Why a law that the runs vary something for is not fitted."""


def fit_all(run_dirs: Sequence[Path], loss: str = "auto") -> Laws:
    """Fit every law that the runs determine. Raises ConfigError for a directory that is not a finished run, and
    ScalingError if no law can be fitted."""
    runs, loss = read_runs(run_dirs, loss)
    law, plan, settings, reasons = None, None, [], []
    try:
        law = fit_loss_law(runs)
    except ScalingError as error:
        reasons.append(str(error))
        try:
            plan = fit_plan_law(runs)
        except ScalingError as other:
            reasons.append(str(other))
    for setting, against in SETTINGS:
        if not _is_varied(runs, setting):
            continue
        try:
            settings.append(fit_setting(runs, setting, against))
        except ScalingError as error:
            reasons.append(f"{error} [against {against}]")
    if law is None and plan is None and not settings:
        raise ScalingError("\n".join(reasons))
    return Laws(runs, loss, law, plan, settings, reasons)


def _is_varied(runs: Sequence[Observation], setting: str) -> bool:
    """Whether any two runs of one size and length differ in a setting."""
    values: dict[tuple[float, float], set[float]] = {}
    tokens = same_tokens(runs)
    for run in runs:
        values.setdefault((run.n, tokens[run.d]), set()).add(getattr(run, setting))
    return any(len(found) > 1 for found in values.values())


def report(laws: Laws, targets: Sequence[Observation] = (), budgets: Sequence[float] = ()) -> dict[str, Any]:
    """Everything that was found, for ladder.json; each estimate is {value, low, high}.

    targets: experiments to predict. budgets: FLOPs for which to give the best N and D, besides those of the targets.
    """
    found: dict[str, Any] = {
        "coverage": COVERAGE,
        "loss": laws.loss,
        "runs": [_as_fields(run) for run in laws.runs],
        "not_fitted": list(laws.reasons),
        "warnings": _embedding_warnings(laws),
        "targets": [],
        "optimum": [],
        "settings": [],
    }
    wanted = [*budgets, *(target.compute for target in targets)]
    if laws.law is not None:
        found["law"] = {name: value._asdict() for name, value in laws.law.parameters().items()}
        for budget in wanted:
            best = {name: value._asdict() for name, value in laws.law.optimum(budget).items()}
            found["optimum"].append({"flops": budget} | best)
    elif laws.plan is not None:
        found["plan"] = {name: value._asdict() for name, value in laws.plan.parameters().items()}
    if (law := laws.law or laws.plan) is not None:
        found["warnings"] += law.warnings()
        for target in targets:
            try:
                loss = _predicted(law, target)._asdict()
            except ScalingError as error:
                found["not_fitted"].append(f"no prediction of {target.name}: {error}")
                continue
            found["targets"].append(_as_fields(target) | {"loss": loss})
    places = {
        "compute": [max(run.compute for run in laws.runs), *wanted],
        "loss": [min(run.loss for run in laws.runs), *(target["loss"]["value"] for target in found["targets"])],
    }
    for setting in laws.settings:
        best_values = [{"at": at} | setting.predict(at)._asdict() for at in places[setting.against]]
        shown = {"setting": setting.setting, "against": setting.against, "exponent": setting.exponent()._asdict()}
        found["settings"].append(shown | {"best": best_values})
    return found


def _predicted(law: LossLaw | PlanLaw, run: Observation) -> Interval:
    if isinstance(law, PlanLaw):
        return law.predict(run.active, run.d)
    return law.predict(run.n, run.d)


def _as_fields(run: Observation) -> dict[str, Any]:
    return run._asdict() | {"active": run.active, "flops": run.compute}


def _size(run: Observation) -> str:
    return f"N {run.n:.3g} ({run.active:.3g} with embedding), D {run.d:.3g}"


def _embedding_warnings(laws: Laws) -> list[str]:
    """Compute counts the embedding. Where its share varies much, a power law of compute is one of two things."""
    uses = ["loss"] if laws.plan is not None else []
    uses += [f"best {law.setting}" for law in laws.settings if law.against == "compute"]
    shares = [run.embedding / run.active for run in laws.runs]
    if not uses or max(shares) <= MOST_SHARE_CHANGE * min(shares):
        return []
    return [
        f"compute counts the embedding, which is {min(shares):.0%} to {max(shares):.0%} of the active parameters of "
        f"these runs: laws against compute ({', '.join(uses)}) bend where that share changes"
    ]


def table(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows for the terminal: group, what, value, interval."""
    rows = [
        (
            "run",
            run["name"],
            f"{run['loss']:.4f}",
            f"N {run['n']:.3g} ({run['active']:.3g} with embedding), D {run['d']:.3g}, lr {run['lr']:.3g}",
        )
        for run in found["runs"]
    ]
    for key, title in (("law", LAW_TITLE), ("plan", "loss = E + K/C^gamma on this plan")):
        rows += [(title, name, *_shown(value)) for name, value in found.get(key, {}).items()]
    for target in found.get("targets", ()):
        size = f"N {target['n']:.3g} ({target['active']:.3g} with embedding), D {target['d']:.3g}"
        rows.append((f"loss of {target['name']}", size, *_shown(target["loss"])))
    for best in found.get("optimum", ()):
        names = {"N": "N", "active": "N with embedding", "D": "D", "loss": "loss"}
        rows += [(f"best for {best['flops']:.3g} FLOPs", names[name], *_shown(best[name])) for name in names]
    for law in found["settings"]:
        title = f"best {law['setting']} by {law['against']}"
        rows.append((title, "exponent", *_shown(law["exponent"])))
        rows += [(title, f"at {best['at']:.3g}", *_shown(best)) for best in law["best"]]
    return rows


def _shown(value: dict[str, float]) -> tuple[str, str]:
    return f"{value['value']:.4g}", f"{value['low']:.4g} to {value['high']:.4g}"


def write(found: dict[str, Any], laws: Laws, folder: Path) -> list[str]:
    """Write ladder.json, and ladder.png where matplotlib is installed; returns lines that say so. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "ladder.json", json.dumps(found, indent=1) + "\n")
    lines = [f"wrote {folder / 'ladder.json'}"]
    if laws.law is None:
        return lines
    try:
        _draw(laws, laws.law, folder / "ladder.png")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return [*lines, f"no plot: plots need matplotlib ({install_hint('matplotlib')})"]
    return [*lines, f"wrote {folder / 'ladder.png'}"]


def _draw(laws: Laws, law: LossLaw, file: Path) -> None:
    """Losses over tokens, one curve per size, and the best size over compute with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [run.d for run in laws.runs]
    grid = np.geomspace(min(tokens) / 1.5, max(tokens) * 1.5, 40)
    for n in sorted({run.n for run in laws.runs}):
        (line,) = left.plot(grid, [law.predict(n, d).value for d in grid], label=f"N = {n:.3g}")
        same = [run for run in laws.runs if run.n == n]
        left.plot([run.d for run in same], [run.loss for run in same], "o", color=line.get_color())
    left.set(xscale="log", xlabel="tokens D", ylabel=f"{laws.loss}, nats per token", title="loss")
    left.legend(fontsize=8)
    computes = [run.compute for run in laws.runs]
    budgets = np.geomspace(min(computes), max(computes) * 10, 30)
    best: list[Interval] = [law.optimum(budget)["N"] for budget in budgets]
    right.plot(budgets, [one.value for one in best])
    right.fill_between(budgets, [one.low for one in best], [one.high for one in best], alpha=0.2)
    title = f"best size, {COVERAGE:.0%} interval"
    right.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="N (active, without embedding)", title=title)
    figure.savefig(file)
