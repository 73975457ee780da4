"""The kernels of permute and combine against the plain functions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hunyuan_pretrain.model.kernels.permutation import combine, permute
from hunyuan_pretrain.model.permutation import combine as plain_combine
from hunyuan_pretrain.model.permutation import permute as plain_permute
from hunyuan_pretrain.model.routing import RoutingPlan
from tests.helpers.kernels import assert_rounded_once, random_plan, results


class Case(NamedTuple):
    T: int
    K: int
    R: int
    dropped: int
    D: int


CASES = {
    "permutation": Case(21, 1, 21, 0, 40),
    "empty slots": Case(21, 1, 30, 0, 40),
    "empty slots far past the choices": Case(5, 1, 60, 2, 40),
    "dropped choices": Case(21, 1, 12, 9, 40),
    "both": Case(21, 1, 16, 9, 40),
    "top 2": Case(13, 2, 26, 0, 24),
    "top 2, both": Case(13, 2, 24, 7, 24),
    "top 4, both": Case(11, 4, 47, 13, 24),
    "top 4, more choices than rows": Case(11, 4, 9, 35, 24),
    "long rows": Case(5, 2, 9, 3, 2100),
    "one number": Case(1, 1, 1, 0, 1),
    "all dropped": Case(3, 2, 5, 6, 24),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def plan_of(case: Case, device: str) -> RoutingPlan:
    return random_plan(case.T, case.K, case.R, case.dropped, device)


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def combine_inputs(case: Case, plan: RoutingPlan, dtype: torch.dtype, device: str) -> list[Tensor]:
    rows_RD, shared_TD, residual_TD = (
        normal(rows, case.D, dtype=dtype, device=device, seed=seed)
        for seed, rows in enumerate((case.R, case.T, case.T))
    )
    return [rows_RD, plan.weight_TK, shared_TD, residual_TD]


@EVERY
@DTYPES
def test_permute_gathers_and_its_gradient_sums(case: Case, dtype: torch.dtype, device: str) -> None:
    plan = plan_of(case, device)
    hidden_TD = normal(case.T, case.D, dtype=dtype, device=device)
    grads = [normal(rows, case.D, dtype=dtype, device=device, seed=seed) for seed, rows in ((1, case.R), (2, case.T))]
    kernel, plain = (partial(lambda function, x: function(x, plan), function) for function in (permute, plain_permute))
    assert_rounded_once(kernel, plain, [hidden_TD], tuple(grads))
    assert_rounded_once(lambda x: kernel(x)[0], lambda x: plain(x)[0], [hidden_TD], grads[0])
    rows_RD, again_TD = permute(hidden_TD, plan)
    assert torch.equal(again_TD, hidden_TD)
    assert torch.equal(rows_RD, plain_permute(hidden_TD, plan)[0])
    assert (rows_RD[plan.token_R == case.T] == 0).all()


@EVERY
@DTYPES
def test_combine_adds_weighted_rows_shared_expert_and_residual(case: Case, dtype: torch.dtype, device: str) -> None:
    plan = plan_of(case, device)
    inputs = combine_inputs(case, plan, dtype, device)
    # what nothing may read: neither an output nor a gradient may become nan
    inputs[0][plan.token_R == case.T] = torch.nan
    grad_TD = normal(case.T, case.D, dtype=dtype, device=device, seed=9)

    def of(function: Any) -> Any:
        return lambda rows, weight, shared, residual: function(rows, weight, plan, shared, residual)

    assert_rounded_once(of(combine), of(plain_combine), inputs, grad_TD)
    _, grad_rows_RD, grad_weight_TK, *others = results(of(combine), inputs, grad_TD)
    assert (grad_rows_RD[plan.token_R == case.T] == 0).all()
    assert (grad_weight_TK[plan.row_TK == case.R] == 0).all()
    assert all(grad.data_ptr() == grad_TD.data_ptr() for grad in others), "not a copy"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_inputs_may_be_parts_of_wider_tensors(index_dtype: torch.dtype, device: str) -> None:
    case = CASES["top 2, both"]
    plan = plan_of(case, device)

    def widened(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[1] + 5), -9, dtype=x.dtype, device=device)
        wide[:, 2:-3] = x
        return wide[:, 2:-3]

    plan = plan._replace(row_TK=widened(plan.row_TK.to(index_dtype)), token_R=plan.token_R.to(index_dtype))
    inputs = [widened(x) for x in combine_inputs(case, plan, torch.float32, device)]
    assert not any(x.is_contiguous() for x in inputs)
    grad_TD = widened(normal(case.T, case.D, device=device, seed=9))
    assert_rounded_once(
        lambda rows, weight, shared, residual: combine(rows, weight, plan, shared, residual),
        lambda rows, weight, shared, residual: plain_combine(rows, weight, plan, shared, residual),
        inputs,
        grad_TD,
    )
    grad_RD = widened(normal(case.R, case.D, device=device, seed=9))
    assert_rounded_once(lambda x: permute(x, plan)[0], lambda x: plain_permute(x, plan)[0], inputs[3:], grad_RD)


def test_a_gradient_of_any_layout_is_read_rightly(device: str) -> None:
    case = CASES["both"]
    plan = plan_of(case, device)
    for grad_TD in (normal(case.D, case.T, device=device).t(), torch.ones((), device=device).expand(case.T, case.D)):
        assert_rounded_once(
            lambda rows, weight, shared, residual: combine(rows, weight, plan, shared, residual),
            lambda rows, weight, shared, residual: plain_combine(rows, weight, plan, shared, residual),
            combine_inputs(case, plan, torch.float32, device),
            grad_TD,
        )


def test_no_tokens_and_no_rows(device: str) -> None:
    case = Case(0, 2, 0, 0, 24)
    plan = plan_of(case, device)
    inputs = combine_inputs(case, plan, torch.float32, device)
    assert permute(inputs[3], plan)[0].shape == (0, 24)
    output_TD, *grads = results(lambda *x: combine(x[0], x[1], plan, *x[2:]), inputs, inputs[3])
    assert output_TD.shape == (0, 24)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]


def test_only_rows_and_weights_are_kept_for_the_backward_pass(device: str) -> None:
    case = CASES["top 2, both"]
    plan = plan_of(case, device)
    inputs = [x.requires_grad_() for x in combine_inputs(case, plan, torch.float32, device)]
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        permute(inputs[3], plan)
        combine(inputs[0], inputs[1], plan, *inputs[2:])
    assert kept == [inputs[0].data_ptr(), inputs[1].data_ptr()]


def test_what_would_be_read_wrongly_is_refused(device: str) -> None:
    case = CASES["top 2"]
    plan = plan_of(case, device)
    rows_RD, weight_TK, shared_TD, residual_TD = combine_inputs(case, plan, torch.float32, device)
    across = normal(case.D, case.T, device=device).t()
    with pytest.raises(
        ValueError, match=r"the permute kernel: hidden has shape \(13, 24\), strides \(1, 13\); the last"
    ):
        permute(across, plan)
    with pytest.raises(ValueError, match=r"the combine kernel: residual has shape \(13, 24\), strides \(1, 13\)"):
        combine(rows_RD, weight_TK, plan, shared_TD, across)
    with pytest.raises(ValueError, match=r"the combine kernel: weight has shape \(13, 2\), strides \(1, 13\)"):
        combine(rows_RD, weight_TK.t().contiguous().t(), plan, shared_TD, residual_TD)
    transposed = plan._replace(row_TK=plan.row_TK.t().contiguous().t())
    with pytest.raises(ValueError, match=r"the combine kernel: plan.row_TK has shape \(13, 2\), strides \(1, 13\)"):
        combine(rows_RD, weight_TK, transposed, shared_TD, residual_TD)
    with pytest.raises(ValueError, match=r"the combine kernel: shared is torch.bfloat16, but rows is torch.float32"):
        combine(rows_RD, weight_TK, plan, shared_TD.bfloat16(), residual_TD)
    with pytest.raises(ValueError, match=r"the permute kernel: plan.row_TK is on meta, but must be on"):
        permute(residual_TD, plan._replace(row_TK=plan.row_TK.to("meta")))
