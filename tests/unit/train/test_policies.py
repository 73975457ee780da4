"""Verdicts on steps, the norm of an update, and digests of what is computed twice."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.config.decisions import InForce
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import ResilienceConfig, StageConfig
from hunyuan_pretrain.train import rollback
from hunyuan_pretrain.train.optimizer import prepare, set_learning_rate, update
from hunyuan_pretrain.train.policies import Judge, Numbers, data_of, left_out, numbers_of, shared_numbers
from hunyuan_pretrain.train.rerun import PIECE, digest
from hunyuan_pretrain.train.step import compute_gradients
from hunyuan_pretrain.train.update_norm import update_norm
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

GOOD = [4.0, 4.2, 3.8, 4.0]
"""Mean 4, standard deviation sqrt(0.02)."""
SPIKES: dict[str, Any] = {"on_spike": "skip", "spike_window_steps": 4, "spike_loss_sigmas": 5.0}


def judge(decisions: InForce | None = None, state: Any = None, **settings: Any) -> Judge:
    return Judge(ResilienceConfig(**settings), decisions or InForce(), state)


def after(good: list[float], **settings: Any) -> Judge:
    """A judge that has seen good steps with these losses and gradient norms of 1."""
    found = judge(**settings)
    for step, loss in enumerate(good):
        assert found.judge(step, 0, Numbers(loss, 1.0)).kind == "update"
    return found


def test_the_limit_is_the_mean_plus_deviations_of_the_last_good_steps() -> None:
    limit = 4 + 5 * math.sqrt(0.02)
    verdict = after([9.0, *GOOD], **SPIKES).judge(5, 0, Numbers(limit + 1e-9, 1.0))
    assert (verdict.kind, verdict.cause) == ("skip", "spike")
    assert verdict.thresholds["loss"] == pytest.approx(limit)
    assert verdict.thresholds["grad_norm"] == pytest.approx(1.06), "a deviation counts as 1 % of the mean at least"
    assert after(GOOD, **SPIKES).judge(4, 0, Numbers(limit - 1e-9, 1.05)).kind == "update"
    assert after(GOOD, **SPIKES).judge(4, 0, Numbers(4.0, 1.07)).kind == "skip"


def test_there_is_no_spike_before_half_a_window_of_the_stage() -> None:
    assert after(GOOD[:1], **SPIKES).judge(1, 0, Numbers(100.0, 1.0)).kind == "update"
    assert after(GOOD[:2], **SPIKES).judge(2, 0, Numbers(100.0, 1.0)).kind == "skip"
    assert after(GOOD, **SPIKES).judge(4, 1, Numbers(100.0, 1.0)).kind == "update", "a new stage"


def test_bad_steps_do_not_count_and_end_the_run_after_some_in_a_row() -> None:
    found = after(GOOD, **SPIKES, max_skips_in_a_row=2)
    kinds = [found.judge(4 + number, 0, Numbers(50.0, 1.0)).kind for number in range(3)]
    assert kinds == ["skip", "skip", "stop"]
    assert found.state()["good"]["loss"] == GOOD
    found = after(GOOD, **SPIKES, max_skips_in_a_row=1)
    kinds = [found.judge(4 + number, 0, Numbers(loss, 1.0)).kind for number, loss in enumerate((50.0, 4.0, 50.0))]
    assert kinds == ["skip", "update", "skip"]


@pytest.mark.parametrize("bad", [Numbers(math.nan, 1.0), Numbers(4.0, math.inf), Numbers(4.0, 1.0, math.nan)])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_what_is_not_finite_is_never_a_spike(bad: Numbers, policy: Any) -> None:
    verdict = after(GOOD, on_nonfinite=policy, on_spike="skip").judge(4, 0, bad)
    assert (verdict.kind, verdict.cause) == (policy, "nonfinite")


def test_the_ledger_decides_whatever_a_step_computes() -> None:
    found = judge(InForce(skips=frozenset({2})))
    assert found.judge(0, 0, Numbers(4.0, 1.0)).kind == "update"
    verdict = found.judge(1, 0, Numbers(4.0, 1.0))
    assert (verdict.kind, verdict.is_in_ledger) == ("skip", True)


def test_a_judge_goes_on_from_a_checkpoint() -> None:
    found = after(GOOD, **SPIKES)
    again = judge(state=json.loads(json.dumps(found.state())), **SPIKES)
    assert again.state() == found.state()
    numbers = Numbers(4.71, 1.0)
    assert again.judge(4, 0, numbers) == found.judge(4, 0, numbers)


def test_every_rank_judges_by_the_norms_of_rank_0_and_hears_of_all() -> None:
    def shares(*norms: float) -> torch.Tensor:
        numbers = [torch.tensor(norm, dtype=torch.float64) for norm in norms]
        return sum(
            (shared_numbers(norm, norm * 2, rank) for rank, norm in enumerate(numbers)),
            torch.zeros(3, dtype=torch.float64),
        )

    assert numbers_of(3.0, shares(0.1, 0.2, 0.3), True) == Numbers(3.0, 0.1, 0.2)
    assert math.isnan(numbers_of(3.0, shares(0.1, math.inf), False).grad_norm)


def stages(*lengths: int) -> list[StageConfig]:
    found = []
    for number, length in enumerate(lengths):
        fields = {"tokens": length * 8 * 64, "sequence_length": 64, "global_batch_sequences": 8, "lr_end": 1.0}
        found.append(StageConfig.model_validate(fields | {"name": f"s{number}", "data": [{"path": "x"}]}))
    return found


def test_a_roll_back_over_a_border_leaves_out_the_rest_of_a_stage_and_the_start_of_the_next() -> None:
    parts = stages(4, 2, 6)
    schedule = Schedule.of(parts)
    windows = left_out(schedule, to_step=3, step=7, margin=1)
    assert windows == (("s0", 24, 32), ("s1", 0, 16), ("s2", 0, 24))
    rest = Schedule.of_segments([(0, parts), (3, parts)], [(), windows])
    assert rest.num_steps == schedule.num_steps
    assert [data_of(rest, step) for step in range(3, 8)] == [
        ("s0", 32, 40), ("s1", 16, 24), ("s1", 24, 32), ("s2", 24, 32), ("s2", 32, 40),
    ]  # fmt: skip
    assert [rest.lr_fraction(step) for step in range(12)] == [schedule.lr_fraction(step) for step in range(12)]


@pytest.mark.parametrize("precision", [{}, {"dtype": "bf16"}])
def test_the_norm_of_an_update_is_known_before_it(corpus, tmp_path, precision) -> None:
    fields = experiment_fields(corpus, tmp_path / "run", 3, model__num_layers=2)
    fields["precision"] |= precision
    fields["optimizer"] |= {"weight_decay": 0.0, "clip_grad": 0.05}
    fields["parallel"] = {"use_distributed_optimizer": False}
    run = on_this_rank(fields)
    for step in range(3):
        run.optimizer.zero_grad()
        compute_gradients(run, run.schedule.stage(step), step)
        set_learning_rate(run.optimizer, 1e-2, 1.0)
        grad_norm = prepare(run.optimizer)
        expected = update_norm(run.optimizer, grad_norm).item()
        assert update_norm(run.optimizer, grad_norm).item() == expected, "changes nothing"
        before = main_weights(run)
        update(run.optimizer, grad_norm)
        moved = np.sqrt(
            sum(np.square((new - old) / 1e-2).sum() for new, old in zip(main_weights(run), before, strict=True))
        )
        assert expected == pytest.approx(moved, rel=1e-4), f"step {step}"
    run.loader.close()


def test_split_main_weights_and_moments_have_the_same_norm(corpus, tmp_path) -> None:
    """With optimizer.use_precision_aware_optimizer: up to the rounding of moments."""
    found: list[list[float]] = []
    for is_split in (False, True):
        fields = experiment_fields(corpus, tmp_path / f"run{is_split}", 3, model__num_layers=2)
        fields["precision"] |= {"dtype": "bf16"}
        fields["optimizer"] |= {"use_precision_aware_optimizer": is_split}
        run = on_this_rank(fields)
        norms: list[float] = []
        for step in range(3):
            run.optimizer.zero_grad()
            compute_gradients(run, run.schedule.stage(step), step)
            grad_norm = prepare(run.optimizer)
            norms.append(update_norm(run.optimizer, grad_norm).item())
            update(run.optimizer, grad_norm)
        found.append(norms)
        run.loader.close()
    assert found[1] == pytest.approx(found[0], rel=1e-2)
    assert found[0][1] != pytest.approx(found[0][0], rel=1e-2), "moments count"


def main_weights(run: Any) -> list[np.ndarray]:
    groups = [group for part in run.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    return [weight.detach().double().numpy().copy() for group in groups for weight in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_changed_bit_changes_a_digest(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(700).to(dtype)
    before, bits = digest(tensor), tensor.view(torch.uint8)
    for place in torch.randint(0, len(bits), (40,)).tolist():
        bits[place] ^= 1 << (place % 8)
        assert not torch.equal(digest(tensor), before)
        bits[place] ^= 1 << (place % 8)
    assert torch.equal(digest(tensor), before)
    assert not torch.equal(digest(tensor.roll(1)), before), "the order counts"


def test_a_digest_covers_every_piece() -> None:
    tensor = torch.zeros(PIECE + 3)
    before = digest(tensor)
    tensor[-1] = 1.0
    assert not torch.equal(digest(tensor), before)
    assert digest(torch.zeros(0)).tolist() == [0, 0]


def test_a_skipped_step_is_an_alarm_once_it_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(rollback, "decision_on", lambda schedule, step, kind, *_, **__: (step, kind))
    monkeypatch.setattr(rollback, "_append", lambda run, decision: done.append(decision))
    run: Any = SimpleNamespace(schedule=None, log=SimpleNamespace(event=lambda *said: done.append(said)))
    verdict = SimpleNamespace(kind="skip", cause="nonfinite", thresholds={})
    numbers = SimpleNamespace(loss=math.nan, grad_norm=1.0, update_norm=None)
    step: Any = SimpleNamespace(step=6, verdict=verdict, result=lambda: numbers)
    rollback.note_skip(run, step)
    written, (kind, text, at) = done
    assert written == (6, "skip")
    assert (kind, at) == ("alarm", 7)
    assert text.endswith("; the update of this step is left out")
