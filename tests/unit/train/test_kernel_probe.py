"""The check of the kernels before training: right kernels pass, and each planted fault stops the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hunyuan_pretrain.model import kernels
from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.train import TrainingError, kernel_probe, probes
from hunyuan_pretrain.train.kernel_probe import Inputs, check_kernels, compared, differences, tolerance
from hunyuan_pretrain.train.run import Run
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

NAMES = Functions._fields


def opened(corpus: Path, folder: Path, **changes: Any) -> Run:
    """Two layers and one sequence of 64 tokens, told that it uses kernels."""
    sizes = {"model__num_layers": 2, "stages__micro_batch_sequences": 1}
    run = on_this_rank(experiment_fields(corpus, folder / "run", **sizes, **changes))
    run.chunks[0].config.uses_kernels = True
    return run


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    opened_run = opened(corpus, tmp_path_factory.mktemp("kernels"))
    yield opened_run
    opened_run.loader.close()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_scale = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.backward_scale, None, None


def scaled(function: Callable[..., Any], forward: float = 1.0, backward: float = 1.0) -> Callable[..., Any]:
    """The function with its results times `forward`, and their gradients times `backward`."""

    def wrapped(*arguments: Any) -> Any:
        found = function(*arguments)
        if isinstance(found, tuple):
            return tuple(_Scaled.apply(x, forward, backward) for x in found)
        return _Scaled.apply(found, forward, backward)

    return wrapped


def planted(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    monkeypatch.setattr(kernels, "kernel_functions", lambda: plain_functions()._replace(**functions))


def test_kernels_match_and_the_probes_say_so_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        name for name in NAMES if getattr(kernels.kernel_functions(), name) is not getattr(plain_functions(), name)
    ]
    line = check_kernels(run)
    assert line.startswith(
        f"probe: the kernels of {', '.join(names)} match the plain functions, forward and backward ("
    )
    for other in ("check_attention", "check_leakage", "check_liveness"):
        monkeypatch.setattr(probes, other, lambda run: "another")
    assert probes.probe(run) == [line, "another", "another", "another"]
    run.chunks[0].config.uses_kernels = False
    assert probes.probe(run) == ["another", "another", "another"]
    run.chunks[0].config.uses_kernels = True


@pytest.mark.parametrize("fault", [{"forward": 1.01}, {"backward": 1.01}], ids=str)
@pytest.mark.parametrize(
    "name", ["add_rms_norm", "rope_norm", "qkv_rope_norm", "swiglu", "router_logits", "permute", "combine"]
)
def test_a_kernel_that_is_wrong_by_a_hundredth_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, fault: dict[str, float]
) -> None:
    planted(monkeypatch, **{name: scaled(getattr(plain_functions(), name), **fault)})
    with pytest.raises(TrainingError) as caught:
        check_kernels(run)
    message = str(caught.value)
    part = "result " if "forward" in fault else "gradient of argument "
    sizes = "on random inputs in the sizes of this run"
    assert message.startswith(
        f"Triton kernels do not match the plain functions {sizes}: {name} by 0.01 (rank 0: {part}"
    )
    assert "by 0.01); rounding explains 0.0001, relative. Set runtime.kernels=never to" in message


def test_too_little_memory_to_compare_is_said_as_that(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the arguments are made: every rank has to reach the reduction."""

    def without_memory(inputs: Inputs) -> Any:
        raise torch.OutOfMemoryError

    planted(monkeypatch, swiglu=scaled(plain_functions().swiglu))
    monkeypatch.setattr(Inputs, "swiglu", without_memory)
    with pytest.raises(TrainingError, match=r"swiglu by inf \(rank 0: no memory left to compare; runtime.probes=false"):
        check_kernels(run)


def test_a_wrong_gradient_of_the_logits_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def times_1_01(logits_cV: torch.Tensor, *others: Any) -> torch.Tensor:
        loss = plain_functions().chunk_loss(logits_cV, *others)
        logits_cV.mul_(1.01)
        return loss

    planted(monkeypatch, chunk_loss=times_1_01)
    with pytest.raises(TrainingError, match=r"chunk_loss by 0\.01 \(rank 0: result 2 by 0\.01\)"):
        check_kernels(run)


def test_a_wrong_row_of_a_large_result_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_last_row(hidden_TD: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows_RD, hidden_TD = plain_functions().permute(hidden_TD, plan)
        return torch.cat((rows_RD[:-1], rows_RD[-1:] * 1.01)), hidden_TD

    planted(monkeypatch, permute=without_last_row)
    with pytest.raises(TrainingError, match=r"permute by 0\.0\d* \(rank 0: result 1 by"):
        check_kernels(run)


def test_a_result_that_is_not_finite_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, swiglu=scaled(plain_functions().swiglu, forward=float("nan")))
    with pytest.raises(TrainingError, match=r"swiglu by inf \(rank 0: result 1 by inf\)"):
        check_kernels(run)


def test_a_kernel_that_fails_is_named_with_its_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no such instruction")

    planted(monkeypatch, swiglu=fails)
    with pytest.raises(TrainingError, match=r"swiglu by inf \(rank 0: RuntimeError: no such instruction\)"):
        check_kernels(run)


def test_a_kernel_that_leaves_the_gpu_unusable_is_named_alone_and_nothing_is_told_to_others(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a wrong address CUDA refuses every call, so this rank could only wait, and later kernels would be named."""
    is_dead, tried = [False], []

    def reads_a_wrong_address(*arguments: Any) -> Any:
        is_dead[0] = True
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nFor debugging consider")

    def give_back(device: torch.device) -> None:
        if is_dead[0]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def later(*arguments: Any) -> Any:
        tried.append("a later kernel")

    planted(monkeypatch, swiglu=reads_a_wrong_address, chunk_loss=later)
    monkeypatch.setattr(kernel_probe, "give_back", give_back)
    monkeypatch.setattr(kernel_probe, "worst_of_ranks", lambda mine: pytest.fail("it tells others"))
    with pytest.raises(TrainingError) as caught:
        check_kernels(run)
    assert str(caught.value) == (
        "the Triton kernel of swiglu has left the GPU of this rank unusable: AcceleratorError: CUDA error: an illegal "
        "memory access was encountered. Set runtime.kernels=never to train without kernels"
    )
    assert tried == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_plain_function_is_not_rounded_to_tf32(fails: bool) -> None:
    """Containers enable it. The kernel runs as it will in training."""
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        if fails and len(seen) == 2:
            raise RuntimeError("no memory")
        return x * 2

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError, match="no memory") if fails else nullcontext():
            differences(function, function, (torch.ones(2, 3),), 0)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == [True, False]


def test_too_little_memory_for_the_other_probes_is_said_as_that(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(run: Run) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(probes, "check_kernels", lambda run: "the kernels match")
    monkeypatch.setattr(probes, "check_leakage", without_memory)
    with pytest.raises(TrainingError) as caught:
        probes.probe(run)
    why = "CUDA out of memory. Tried to allocate 2 GiB"
    assert str(caught.value) == f"no memory left for the probes; runtime.probes=false leaves them out: {why}"


def test_integers_have_to_be_equal() -> None:
    choice = torch.arange(5)
    assert differences(lambda x: x + 0, lambda x: x.int(), (choice,), 0) == {"result 1": 0.0}
    assert differences(lambda x: x + (x == 3), lambda x: x, (choice,), 0) == {"result 1": float("inf")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__moe_router_topk": 2, "model__recycle_routing": False},
        {"model__moe_expert_capacity_factor": None, "model__recycle_routing": False, "model__qk_layernorm": False},
    ],
    ids=["top 1", "top 2 with dropped choices", "dropless, without norm"],
)
def test_every_function_has_arguments_in_the_sizes_of_the_run(
    corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also those whose kernels are the plain functions. In bf16 they differ from themselves in fp32 by their
    roundings."""
    run = opened(corpus, tmp_path, precision={"dtype": "bf16"}, **changes)
    run.loader.close()
    inputs = Inputs(run.chunks[0].config, 128, run.device, 1)
    for name in NAMES:
        arguments = inputs.of(name)
        if arguments is None:
            assert name == "assign"
            continue
        function = compared(plain_functions(), name)
        found = differences(function, function, arguments, 2)
        assert max(found.values()) < 2 * tolerance(torch.bfloat16), (name, found)
    assert inputs.plan.num_rows == inputs.of("swiglu")[0].shape[0]  # type: ignore[index]
