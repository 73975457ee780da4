"""What core's pipeline schedules do, pass by pass and message by message, is what plan.pipeline says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.pipeline import Exchange, Operation, Pass, Wait, program
from tests.helpers.layouts import Layout
from tests.helpers.ranks import fork_ranks

pytestmark = pytest.mark.slow

CASES = {
    # chunks, sequences of a micro-batch; the batch has 8 sequences
    2: ((1, 1), (1, 8), (2, 1), (2, 4)),
    4: ((1, 1), (1, 4), (2, 1), (2, 2)),
}


class Heard:
    """A request that says when it is waited for."""

    def __init__(self, request: Any, operations: list[Operation], wait: Wait) -> None:
        self.request, self.operations, self.what = request, operations, wait

    def wait(self) -> None:
        self.operations.append(self.what)
        self.request.wait()


@contextmanager
def recorded(operations: list[Operation], sizes: list[int]) -> Iterator[None]:
    """Record what core's schedule does on this rank, and how many numbers it still holds of each output when the
    backward pass comes to it."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    forward_step, backward_step, communicate = (
        schedules.forward_step,
        schedules.backward_step,
        P2PCommunicator._communicate,
    )
    outputs: list[tuple[Any, int, int]] = []

    def forward(*arguments: Any, **settings: Any) -> Any:
        found = forward_step(*arguments, **settings)
        chunk, number = settings.get("vp_stage") or 0, settings["current_microbatch"]
        operations.append(Pass("forward", chunk, number))
        outputs.append((found[0], chunk, number))
        return found

    def backward(input_tensor: Any, output_tensor: Any, *arguments: Any) -> Any:
        (place,) = (i for i, (output, _, _) in enumerate(outputs) if output is output_tensor)
        held, chunk, number = outputs.pop(place)
        sizes.append((held[0] if isinstance(held, list) else held).numel())
        operations.append(Pass("backward", chunk, number))
        return backward_step(input_tensor, output_tensor, *arguments)

    def exchange(self: Any, *, wait_on_reqs: bool = True, **what: Any) -> Any:
        ends = {
            "send_next": what["tensor_send_next"] is not None,
            "send_prev": what["tensor_send_prev"] is not None,
            "recv_prev": what["recv_prev"],
            "recv_next": what["recv_next"],
        }
        messages = tuple(end for end, is_there in ends.items() if is_there)
        if not messages:
            return communicate(self, wait_on_reqs=wait_on_reqs, **what)
        number = len(operations)
        operations.append(Exchange(messages, wait_on_reqs))  # type: ignore[arg-type]
        received_prev, received_next, requests = communicate(self, wait_on_reqs=wait_on_reqs, **what)
        if requests is not None and not wait_on_reqs:
            requests = {end: Heard(one, operations, Wait(number, end)) for end, one in requests.items()}
        return received_prev, received_next, requests

    with (
        patch.object(schedules, "forward_step", forward),
        patch.object(schedules, "backward_step", backward),
        patch.object(P2PCommunicator, "_communicate", exchange),
    ):
        yield


def operations_of(experiments: list[Experiment]) -> list[tuple[list[Operation], list[int]]]:
    """What this rank does in a step of each experiment, and the sizes of the outputs that it held."""
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import compute_gradients

    found = []
    for experiment in experiments:
        run = setup.prepare(experiment)
        operations: list[Operation] = []
        sizes: list[int] = []
        with recorded(operations, sizes):
            compute_gradients(run, run.schedule.stage(0), 0)
        setup.leave(run)
        found.append((operations, sizes))
    return found


def ordered(operations: list[Operation]) -> list[Operation]:
    """With the messages of a call in one order: they begin together."""
    return [
        Exchange(tuple(sorted(one.messages)), one.is_waited_for) if isinstance(one, Exchange) else one
        for one in operations
    ]


@pytest.mark.parametrize("ranks", CASES)
def test_the_plan_knows_the_order_of_cores_schedules(corpus: Path, tmp_path: Path, ranks: int) -> None:
    experiments = []
    for number, (chunks, micro_batch) in enumerate(CASES[ranks]):
        layout = Layout(pp=ranks, vpp=chunks, micro_batch=micro_batch)
        experiment = layout.experiment(corpus, tmp_path / str(number))
        model = experiment.model.model_copy(update={"num_layers": 2 * ranks * chunks})
        experiments.append(experiment.model_copy(update={"model": model}))
    for rank, found in enumerate(fork_ranks(ranks, operations_of, experiments)):
        for (chunks, micro_batch), (operations, sizes), experiment in zip(
            CASES[ranks], found, experiments, strict=True
        ):
            assert ordered(operations) == ordered(program(rank, ranks, chunks, 8 // micro_batch)), (chunks, micro_batch)
            # the plan counts the outputs of all stages but the last as held until their backward pass
            held = micro_batch * experiment.stages[0].sequence_length * experiment.model.hidden_size
            losses = 8 // micro_batch if rank == ranks - 1 else 0
            assert sorted(sizes) == [1] * losses + [held] * (8 // micro_batch * chunks - losses)
