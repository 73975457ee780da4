"""Core's precision-aware optimizer: moments in bf16, split main weights, gradients without an fp32 copy."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.checkpoint import save_load
from hunyuan_pretrain.checkpoint.optimizer_state import full_moments, reload_weights
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.train.precision_aware_adam import PrecisionAwareAdamW
from tests.helpers.fp8_parameter_cases import differences_of_files
from tests.helpers.one_rank import moments, on_this_rank
from tests.helpers.precision_aware_cases import (
    both_adams_over_stand_ins,
    differences,
    resumed_runs,
    traces_after,
)
from tests.helpers.ranks import fork_ranks, run_ranks
from tests.helpers.runs import experiment_fields

FORMATS = [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
MOMENTS = ("exp_avg", "exp_avg_sq")
LR = 1e-2


def fields(
    corpus: Path,
    run_dir: Path,
    formats: tuple[str, str] | None = ("bf16", "bf16"),
    grad_reduce_in_fp32: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """formats: of the moments; None: core's default optimizer."""
    optimizer: dict[str, Any] = {"lr": LR, "adam_eps": 1e-3, "clip_grad": 0.5, "ema_decay": 0.5}
    if formats is not None:
        names = {"exp_avg_dtype": formats[0], "exp_avg_sq_dtype": formats[1]}
        optimizer |= {"use_precision_aware_optimizer": True} | names
    precision = {"dtype": "bf16", "grad_reduce_in_fp32": grad_reduce_in_fp32}
    return experiment_fields(corpus, run_dir, model__num_layers=2, precision=precision, optimizer=optimizer, **changes)


def whole_state(run: Any) -> dict[str, np.ndarray]:
    return {
        f"{kind} {name}": tensor.numpy().copy()
        for name, tensors, _ in full_moments(run.chunks, run.optimizer)
        for kind, tensor in tensors.items()
    }


# --- the numbers ------------------------------------------------------------------------------------------------------


def reference(steps: int, decay: float, in_bf16: bool) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """The formula of AdamW in fp64, with moments rounded to bf16 between two steps: gradients, first weight, weights
    after each step."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(1000, generator=generator).bfloat16()
    gradients = [torch.randn(1000, generator=generator) for _ in range(steps)]
    main, first, second = start.double(), torch.zeros(1000).double(), torch.zeros(1000).double()
    mains = []
    for step, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        size = (second / (1 - 0.95**step)).sqrt() + 1e-8
        main = main - 1e-2 * (first / (1 - 0.9**step) / size + decay * main)
        mains.append(main)
        if in_bf16:
            first, second = (x.float().bfloat16().double() for x in (first, second))
    return gradients, start, mains


@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_update_is_adamw_with_moments_rounded_after_use(in_bf16: bool) -> None:
    gradients, start, mains = reference(20, 0.1, in_bf16)
    weight = start.clone()
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    group = {"params": [weight], "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = PrecisionAwareAdamW([group], {"exp_avg": dtype, "exp_avg_sq": dtype})
    for gradient, main in zip(gradients, mains, strict=True):
        weight.decoupled_grad = gradient  # type: ignore[attr-defined]
        adam.step()
        # fp32 arithmetic; a moment that falls on the other side of a rounding boundary changes an update by 2^-8 of it
        close = (weight.double() - main).abs() <= main.abs() * (2**-8 + 1e-6) + 1e-4 * in_bf16
        assert close.all()
    state = adam.state[weight]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (dtype, dtype)
    assert state["master_param"].dtype == torch.int16
    assert adam.param_groups[0]["step"] == 20


def test_the_main_weight_moves_where_the_bf16_weight_does_not() -> None:
    """Updates far below half of a bf16 unit add up."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    group = {"params": [weight], "lr": 2**-12, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    adam = PrecisionAwareAdamW([group], {"exp_avg": torch.float32, "exp_avg_sq": torch.float32})
    weight.decoupled_grad = torch.full((4,), -1.0)  # type: ignore[attr-defined]
    for step in range(1, 33):
        adam.step()
        assert (weight == 1 + (step + 16) // 32 * 2**-7).all(), step


def test_a_bf16_second_moment_with_a_slow_decay_never_shrinks() -> None:
    """Which is why the rules refuse it: 0.999 of a bf16 number rounds back to it."""
    values = torch.linspace(1, 2, 129)[:-1].bfloat16()
    assert torch.equal((0.999 * values.float()).bfloat16(), values)
    assert ((1 - 2**-8) * values.float()).bfloat16().lt(values).all()


@pytest.mark.usefixtures("transformer_engine")
def test_the_update_is_that_of_transformer_engine() -> None:
    """FusedAdam's own Python code on stand-ins for its kernels, against PrecisionAwareAdamW, after 12 steps."""
    (results,) = run_ranks(1, both_adams_over_stand_ins, FORMATS, 12)
    for formats, (theirs, ours) in zip(FORMATS, results, strict=True):
        assert differences(formats, theirs, ours) == []
        for name, key in product(("bf16", "fp32"), MOMENTS):
            np.testing.assert_array_equal(ours[name][key], theirs[name][key], err_msg=f"{formats} {name} {key}")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_reduce_in_fp32", [True, False])
def test_the_first_step_is_that_of_the_default_optimizer(corpus, tmp_path, grad_reduce_in_fp32):
    """Same gradients, norm and clipping; main weights up to the order of fp32 operations (torch's AdamW decays the
    weight first). With bf16 gradients clipping rounds them once more, where there is no fp32 copy."""
    runs = [
        on_this_rank(fields(corpus, tmp_path, formats, grad_reduce_in_fp32))
        for formats in (None, ("fp32", "fp32"), ("bf16", "bf16"))
    ]
    plain, split, rounded = (trace_steps(run, range(1))[0] for run in runs)
    assert plain.scalars["grad_norm"] > 0.5, "it is clipped"
    states = [whole_state(run) for run in runs]
    for trace, state in zip((split, rounded), states[1:], strict=True):
        assert trace.scalars == plain.scalars
        assert state.keys() == states[0].keys()
    for key, expected in states[0].items():
        is_moment = key.startswith(MOMENTS)
        gradient = 1e-5 if grad_reduce_in_fp32 else 2**-7  # relative; squared in exp_avg_sq
        size = np.abs(expected).max() if is_moment else LR  # an update is at most about the learning rate
        np.testing.assert_allclose(states[1][key], expected, rtol=1e-6, atol=gradient * size, err_msg=key)
        unit = 2**-8 if is_moment else 0.0  # the first update uses moments before they are rounded
        np.testing.assert_allclose(states[2][key], states[1][key], rtol=unit, atol=1e-6 * size, err_msg=key)


def test_gradients_are_read_where_they_were_reduced(corpus, tmp_path):
    """No fp32 copy of bf16 gradients: what the update reads lies in core's buffers."""
    found = []
    for formats in (None, ("bf16", "bf16")):
        run = on_this_rank(fields(corpus, tmp_path, formats, grad_reduce_in_fp32=False))
        run.optimizer.prepare_grads()
        buffers = {
            buffer.grad_data.untyped_storage().data_ptr()
            for model in run.wrapped
            for buffer in model.buffers + model.expert_parallel_buffers
        }
        name = "grad" if formats is None else "decoupled_grad"
        read = [getattr(weight, name) for weight in run.optimizer.get_parameters()]
        found.append([gradient.untyped_storage().data_ptr() in buffers for gradient in read])
    copied, shared = found
    assert all(shared)
    assert not all(copied)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_bitwise_identical(corpus, tmp_path, formats, overlap):
    parallel = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    first, second = (on_this_rank(fields(corpus, tmp_path, formats, parallel=parallel)) for _ in range(2))
    trace_steps(first, range(2))
    folder = save_load.save(tmp_path, 2, first.chunks, first.optimizer, None)
    assert save_load.load(folder, second.chunks, second.optimizer) == 2
    at_save, loaded = moments(first), moments(second)
    assert at_save.keys() == loaded.keys()
    assert all(np.array_equal(at_save[name], loaded[name]) for name in at_save)
    for actual, expected in zip(trace_steps(second, range(2, 4)), trace_steps(first, range(2, 4)), strict=True):
        assert actual.scalars == expected.scalars
        for name, parameter in expected.parameters.items():
            assert np.array_equal(actual.parameters[name], parameter), name


def test_a_checkpoint_changes_formats_with_one_rounding(corpus, tmp_path):
    """fp32 state into the precision-aware optimizer and back: main weights keep their value, moments are rounded once
    or not at all, and a bf16 weight goes with its main weight."""
    source = on_this_rank(fields(corpus, tmp_path, None))
    trace_steps(source, range(2))
    folder = save_load.save(tmp_path / "plain", 2, source.chunks, source.optimizer, None)
    before = whole_state(source)
    compact = on_this_rank(fields(corpus, tmp_path, ("bf16", "bf16")))
    save_load.load(folder, compact.chunks, compact.optimizer)
    after = whole_state(compact)
    for key, value in before.items():
        expected = torch.from_numpy(value)
        if key.startswith(MOMENTS):
            expected = expected.bfloat16().float()
        assert np.array_equal(after[key], expected.numpy()), key
    for name, weight in compact.chunks[0].named_parameters():
        if weight.dtype == torch.bfloat16:
            main = torch.from_numpy(before[f"main {name}"]).view_as(weight)
            assert torch.equal(weight.detach(), main.bfloat16()), name  # no tie among these few numbers
    folder = save_load.save(tmp_path / "compact", 2, compact.chunks, compact.optimizer, None)
    back = on_this_rank(fields(corpus, tmp_path, None))
    save_load.load(folder, back.chunks, back.optimizer)
    assert all(np.array_equal(value, after[key]) for key, value in whole_state(back).items())


def test_a_main_weight_halfway_between_two_weights_gets_the_weight_that_goes_with_it(corpus, tmp_path):
    """torch rounds it to an even weight, the split optimizer away from zero: on loading the weight follows the
    optimizer, or its next main weight would be wrong by a unit."""
    source = on_this_rank(fields(corpus, tmp_path, None))
    (part,) = source.optimizer.chained_optimizers
    tie = torch.tensor(0x3F808000, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        for main in (main for group in part.shard_fp32_from_float16_groups for main in group):
            main.fill_(tie)
        part._copy_main_params_to_model_params()
    name = "decoder.final_layernorm.weight"
    assert (source.chunks[0].get_parameter(name) == 1.0).all()
    folder = save_load.save(tmp_path, 1, source.chunks, source.optimizer, None)
    compact = on_this_rank(fields(corpus, tmp_path))
    save_load.load(folder, compact.chunks, compact.optimizer)
    assert (compact.chunks[0].get_parameter(name) == 1.0 + 2**-7).all()
    assert (torch.from_numpy(whole_state(compact)[f"main {name}"]) == tie).all()


def test_init_from_starts_from_the_weights(corpus, tmp_path):
    """Remainders of an earlier step do not survive new weights."""
    run = on_this_rank(fields(corpus, tmp_path))
    trace_steps(run, range(1))
    assert any(value.any() for name, value in moments(run).items() if name.endswith("master_param"))
    folder = save_load.save(tmp_path, 1, run.chunks, run.optimizer, None)
    save_load.load(folder, run.chunks, None)
    reload_weights(run.optimizer)
    state = whole_state(run)
    for name, weight in run.chunks[0].named_parameters():
        if weight.dtype == torch.bfloat16:
            assert np.array_equal(state[f"main {name}"].reshape(weight.shape), weight.detach().float().numpy()), name


# --- several ranks, and Transformer Engine ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_resumes_on_one(corpus, tmp_path):
    """With the same bits: saved again, the checkpoint is the same. The next steps agree as far as gradients that are
    summed in another order, in bf16, allow."""
    found = {}
    for number, (ranks, saves) in enumerate([(2, True), (1, False)]):
        experiment = Experiment.model_validate(fields(corpus, tmp_path, stages__micro_batch_sequences=2))
        found[number] = fork_ranks(ranks, traces_after, experiment, 2, 4, saves)[0]
    for two, one in zip(found[0], found[1], strict=True):
        assert one.scalars["loss"] == pytest.approx(two.scalars["loss"], rel=2e-3)
        assert one.scalars["grad_norm"] == pytest.approx(two.scalars["grad_norm"], rel=2e-2)
    assert found[0][0].scalars["loss"] == pytest.approx(found[1][0].scalars["loss"], rel=1e-5)
    alone, folder = on_this_rank(fields(corpus, tmp_path)), tmp_path / "checkpoints/step_0000002"
    save_load.load(folder, alone.chunks, alone.optimizer)
    again = save_load.save(tmp_path / "again", 2, alone.chunks, alone.optimizer, None)
    assert differences_of_files([[folder, again]]) == [[]]


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.slow
def test_runs_with_transformer_engines_adam_resume_bitwise_and_anywhere(corpus, tmp_path):
    """A run of FusedAdam saves after 2 steps; a resumed one is bitwise identical; PrecisionAwareAdamW continues it with
    the same gradients and, up to rounding, the same updates."""
    experiment = Experiment.model_validate(fields(corpus, tmp_path))
    ((whole, resumed),) = run_ranks(1, resumed_runs, [experiment, experiment], 2, 4)
    for actual, expected in zip(resumed, whole, strict=True):
        assert actual.scalars == expected.scalars
        for kind in ("parameters", "moments"):
            for name, value in getattr(expected, kind).items():
                np.testing.assert_array_equal(getattr(actual, kind)[name], value, err_msg=f"{kind} {name}")
    (ours,) = fork_ranks(1, traces_after, experiment, 2, 4, False)
    assert ours[0].scalars == whole[0].scalars, "the first resumed step has the same weights"
    for name, value in whole[0].moments.items():
        np.testing.assert_allclose(ours[0].moments[name], value, rtol=2**-7, atol=1e-6, err_msg=name)
