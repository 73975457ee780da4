"""The report of a ladder: which laws it holds, and what it says of those that it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hunyuan_pretrain.diagnostics import ladder
from hunyuan_pretrain.diagnostics.ladder import fit_all, report, table, write
from hunyuan_pretrain.diagnostics.scaling_laws import Observation, flops


def made_up(cells: list[tuple[float, float]], factors: tuple[float, ...] = (1.0,)) -> list[Observation]:
    """Runs of a known law, each at these multiples of its best learning rate, 0.3 C^-0.12."""
    found = []
    for n, d in cells:
        for factor in factors:
            loss = (1.7 + 400 / n**0.34 + 410 / d**0.28) * (1 + 0.01 * (factor - 1) ** 2)
            found.append(Observation(f"{n:g}_{d:g}", n, d, loss, 0.3 * float(flops(n, d)) ** -0.12 * factor, 1e6))
    return found


def laws_of(runs: list[Observation], monkeypatch: pytest.MonkeyPatch) -> ladder.Laws:
    monkeypatch.setattr(ladder, "read_runs", lambda run_dirs, loss: (runs, "validation_loss"))
    return fit_all([])


def test_a_full_ladder_reports_every_law(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = made_up([(n, d) for n in (1e7, 1e8, 1e9) for d in (1e10, 1e11)] + [(1e8, 3e10)], (0.5, 1.0, 2.0))
    laws = laws_of(runs, monkeypatch)
    target = Observation("large", 1e10, 1e12, 0.0, 1e-3, 1e6)
    found = report(laws, [target], [1e21])
    assert found["targets"][0]["loss"]["value"] == pytest.approx(1.7 + 400 / 1e10**0.34 + 410 / 1e12**0.28, rel=1e-3)
    assert [best["flops"] for best in found["optimum"]] == [1e21, target.compute]
    (setting,) = found["settings"]
    assert (setting["setting"], setting["against"]) == ("lr", "compute")
    assert setting["exponent"]["value"] == pytest.approx(-0.12, abs=0.01)
    assert len(setting["best"]) == 3  # the largest run, the budget, the target
    groups = {row[0] for row in table(found)}
    assert {"loss = E + A/N^alpha + B/D^beta, N without embedding", "loss of large", "best lr by compute"} <= groups
    assert not found["not_fitted"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write(found, laws, tmp_path) == [
        f"wrote {tmp_path / 'ladder.json'}",
        'no plot: plots need matplotlib (pip install "hunyuan-pretrain[logging]")',
    ]
    assert json.loads((tmp_path / "ladder.json").read_text()) == json.loads(json.dumps(found))
    assert not (tmp_path / "ladder.png").exists()


def test_a_ladder_on_one_plan_says_what_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    laws = laws_of(made_up([(n, 20 * n**1.1) for n in (1e7, 3e7, 1e8, 3e8, 1e9)]), monkeypatch)
    targets = [Observation("next", 3e9, 20 * 3e9**1.1, 0.0, 1e-3, 1e6), Observation("odd", 1e8, 1e12, 0.0, 1e-3, 1e6)]
    found = report(laws, targets, [1e21])
    assert "law" not in found
    assert not found["optimum"]
    assert set(found["plan"]) == {"E", "K", "gamma"}
    assert [target["name"] for target in found["targets"]] == ["next"]
    assert "5 runs, at least 6 are needed" in found["not_fitted"][0]
    assert found["not_fitted"][1].startswith("no prediction of odd: not on the plan of the runs")
    assert "loss = E + K/C^gamma on this plan" in {row[0] for row in table(found)}


def test_compute_that_counts_very_different_shares_of_embedding_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = made_up([(n, d) for n in (1e7, 1e8, 1e9) for d in (1e10, 1e11)], (0.5, 1.0, 2.0))
    assert report(laws_of(runs, monkeypatch))["warnings"] == []
    runs = [run._replace(embedding=2e5 * run.n**0.3) for run in runs]
    (warning,) = report(laws_of(runs, monkeypatch))["warnings"]
    assert warning.startswith("compute counts the embedding, which is 9% to 72% of the active parameters"), warning
    assert "(best lr)" in warning


def test_nothing_is_reported_where_nothing_is_determined(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ladder.ScalingError) as refused:
        laws_of(made_up([(1e7, 1e10), (1e8, 1e10)]), monkeypatch)
    assert "2 runs, at least 6 are needed" in str(refused.value)
    assert "2 runs, at least 5 are needed" in str(refused.value)
