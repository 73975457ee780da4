"""The gradient noise scale: the estimator finds a known one, and a step measures what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hunyuan_pretrain.config.derived import LEAST_MEASUREMENTS, expert_lr_ratio
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.train.lr_schedule import measured_ratio_line
from hunyuan_pretrain.train.noise_scale import KINDS, NoiseScale, estimate
from hunyuan_pretrain.train.step import compute_gradients, launch_step
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields


def test_known_noise_is_recovered() -> None:
    """Per-token gradients G + N(0, diag(sigma^2)) in 400 dimensions; 32 parts of 64 tokens, one of which is small."""
    generator = np.random.default_rng(0)
    mean, sigma = generator.normal(size=400) * 0.1, generator.uniform(0.5, 2.0, size=400)
    truth = float((sigma**2).sum() / (mean**2).sum())
    scale, part, parts = NoiseScale(), 64, 32
    found = []
    for step in range(600):
        gradients = mean + generator.normal(size=(parts, 400)) * sigma / np.sqrt(part)
        small, big = float((gradients[0] ** 2).sum()), float((gradients.mean(0) ** 2).sum())
        one = estimate(small, big, part, part * parts)
        found.append(one)
        scale.add(step, {"dense": one})
    assert np.mean([one.trace for one in found]) == pytest.approx((sigma**2).sum(), rel=0.02)
    assert np.mean([one.signal for one in found]) == pytest.approx((mean**2).sum(), rel=0.02)
    # the running sums are a mean over about 200 independent steps: 100 weights, each with half of its square
    assert scale.tokens("dense") == pytest.approx(truth, rel=0.05)
    assert scale.tokens("experts") is None
    assert scale.fields() == {
        "noise_scale_tokens": scale.tokens(*KINDS),
        "noise_scale_tokens_dense": scale.tokens("dense"),
    }


def test_the_value_in_use_is_that_of_the_dense_matrices() -> None:
    """Dense and expert gradients of one noise scale in tokens that a matrix sees, of which an expert sees p. In tokens
    of the batch the experts' scale is (own + 1 - p) / p, and the learning rate must not see that factor twice."""
    generator = np.random.default_rng(1)
    size, batch, part, p = 100, 512, 64, 1 / 16
    mean, sigma = generator.normal(size=size) * 0.5, 1.0
    own = float(size * sigma**2 / (mean**2).sum())
    scale = NoiseScale()
    for step in range(400):
        dense = mean + generator.normal(size=(batch // part, size)) * sigma / np.sqrt(part)
        seen = generator.binomial(part, p, size=(batch // part, 1))
        experts = (seen * mean + np.sqrt(seen) * generator.normal(size=dense.shape) * sigma) / part
        found = {}
        for kind, parts in (("dense", dense), ("experts", experts)):
            small, big = float((parts[0] ** 2).sum()), float((parts.mean(0) ** 2).sum())
            found[kind] = estimate(small, big, part, batch)
        scale.add(step, found)
    scale.begin_stage()
    # a mean over about 200 steps; their scatter is some percent
    assert scale.in_use == pytest.approx(own, rel=0.1)
    assert scale.tokens("experts") == pytest.approx((own + 1 - p) / p, rel=0.2)


def test_a_step_counts_once_and_the_state_comes_back_exactly() -> None:
    scale = NoiseScale()
    assert (scale.tokens("dense"), scale.fields()) == (None, {})
    scale.begin_stage()
    assert scale.in_use is None
    both = {"dense": estimate(3.1, 1.7, 10, 70), "experts": estimate(2.3, 1.1, 20, 70)}
    for step in (3, *range(3, LEAST_MEASUREMENTS + 2)):
        scale.add(step, both)
    assert scale.count == LEAST_MEASUREMENTS - 1
    scale.begin_stage()
    assert scale.in_use is None, "one measurement is missing"
    scale.add(LEAST_MEASUREMENTS + 2, both)
    scale.begin_stage()
    assert scale.in_use == scale.tokens("dense")
    again = NoiseScale(json.loads(json.dumps(scale.state())))
    assert again.state() == scale.state()
    before = again.fields()
    again.add(LEAST_MEASUREMENTS + 2, {"dense": estimate(9.0, 1.0, 10, 70)})
    assert again.fields() == before
    for step in range(20, 30):
        again.add(step, {"dense": estimate(0.0, 9.0, 10, 70), "experts": estimate(0.0, 9.0, 20, 70)})
    assert "noise_scale_tokens" not in again.fields()
    again.begin_stage()
    assert again.in_use == scale.in_use, "nothing usable was measured, so the value in use stays"


def test_the_ratio_of_a_measured_value_is_at_most_one_and_the_log_says_why(corpus, tmp_path) -> None:
    fields = experiment_fields(corpus, tmp_path)
    fields["optimizer"] |= {"measure_noise_scale_every_steps": 1, "expert_lr_noise_scale_tokens": "measured"}
    experiment = Experiment.model_validate(fields)
    noise, batch = NoiseScale(), 4096
    assert measured_ratio_line(experiment, batch, noise) == (
        "noise scale not known after 0 measurements (10 are needed, and positive estimates), learning rate of experts "
        "x 0.31 as configured"
    )
    share = experiment.model.moe_router_topk / experiment.model.num_moe_experts

    def factor(ratio: float) -> float:
        return 2 / (ratio**-0.5 + ratio**0.5)

    noise.in_use = batch / 100
    assert expert_lr_ratio(experiment.model, experiment.optimizer, batch, noise.in_use) == 1.0
    computed = factor(100 * share) / factor(100)
    assert measured_ratio_line(experiment, batch, noise) == (
        f"noise scale 40.96 tokens, learning rate of experts x 1, the limit (computed: {computed:.4g})"
    )
    noise.in_use = batch * 4.0
    below = factor(share / 4) / factor(1 / 4)
    assert measured_ratio_line(experiment, batch, noise).endswith(f"learning rate of experts x {below:.4g}")


@pytest.mark.parametrize("is_sharded", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_a_step_measures_its_first_micro_batch_and_its_batch(corpus, tmp_path, is_sharded) -> None:
    """Without router losses a gradient times its target tokens is a sum over micro-batches, so that of the first can be
    computed alone."""
    fields = experiment_fields(corpus, tmp_path, model__num_layers=2, model__moe_aux_loss_coeff=0.0)
    fields["optimizer"]["measure_noise_scale_every_steps"] = 1
    fields["parallel"]["use_distributed_optimizer"] = is_sharded
    run = on_this_rank(fields)
    stage, batches = run.schedule.stage(0), run.loader.micro_batches(0)

    def squares_of(count: int) -> dict[str, float]:
        alone = on_this_rank({**fields, "optimizer": {"lr": 1e-2}})
        alone.loader.micro_batches = lambda step: batches[:count]  # type: ignore[method-assign]
        compute_gradients(alone, stage, 0)
        found = {"dense": 0.0, "experts": 0.0}
        tokens = sum(float(batch.loss_mask_T.sum()) for batch in batches[:count])
        for name, weight in alone.chunks[0].named_parameters():
            is_measured = weight.dim() > 1 and not name.startswith("embedding") and "router" not in name
            if is_measured:
                kind = "experts" if ".experts." in name and "shared" not in name else "dense"
                found[kind] += float((weight.main_grad.double() * tokens).square().sum())
        alone.loader.close()
        assert min(found.values()) > 0
        return found

    result = launch_step(run, stage, 0).result()
    small, big = squares_of(1), squares_of(len(batches))
    target = result.num_target_tokens
    expected = [small[kind] / target**2 for kind in KINDS] + [big[kind] / target**2 for kind in KINDS]
    assert result.noise == pytest.approx(expected, rel=1e-5)
    run.noise.add_numbers(0, stage, result.noise)
    parts = len(batches)
    exact = estimate(expected[0] * parts**2, expected[2], stage.global_batch_tokens / parts, stage.global_batch_tokens)
    assert run.noise.state()["sums"]["dense"] == pytest.approx(exact, rel=1e-4)
    run.loader.close()


def test_only_the_steps_asked_for_are_measured(corpus, tmp_path) -> None:
    fields = experiment_fields(corpus, tmp_path, model__num_layers=2)
    fields["optimizer"]["measure_noise_scale_every_steps"] = 2
    run, plain = on_this_rank(fields), on_this_rank({**fields, "optimizer": {"lr": 1e-2}})
    for step in range(3):
        result = launch_step(run, run.schedule.stage(step), step).result()
        reference = launch_step(plain, plain.schedule.stage(step), step).result()
        assert len(result.noise) == (4 if step == 1 else 0)
        assert (result.loss, result.grad_norm) == (reference.loss, reference.grad_norm), "bitwise"
        assert torch.equal(result.statistics.chosen_E, reference.statistics.chosen_E)
    for one in (run, plain):
        one.loader.close()
