"""Steps as CUDA graphs: a run whose steps are recorded and replayed gives the losses, gradient norms, statistics and
weights of one that computes them, bit by bit.

tests/helpers/replay.py stands in for a CUDA graph: it runs exactly the recorded operators on the same memory. torch's
kernel for packed documents is a stand-in too. tests/gpu/test_recorded_step.py captures real graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer

from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.config.attention import PER_DOCUMENT, AttentionChoice
from hunyuan_pretrain.model.attention_backends import use_attention
from hunyuan_pretrain.runtime import handover
from hunyuan_pretrain.train import TrainingError, recorded_step
from hunyuan_pretrain.train.evaluate import evaluate
from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
from hunyuan_pretrain.train.recorded_step import COMPUTED, RecordedSteps
from hunyuan_pretrain.train.step import train_step
from tests.helpers import flash_attention_stub
from tests.helpers.one_rank import on_this_rank
from tests.helpers.replay import StandIn
from tests.helpers.runs import SEQUENCE_LENGTH, experiment_fields

FIRST, STEPS = 4, 9
"""Steps of the first stage, and of both: in each, two are computed, the others replayed."""


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    with flash_attention_stub.torch_operator():
        yield


@pytest.fixture(scope="module")
def packs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed sequences of one to many documents: the paragraphs of the corpus."""
    folder = tmp_path_factory.mktemp("packs")
    paragraphs = [text for file in sorted((corpus / "texts").glob("*.txt")) for text in file.read_text().split("\n\n")]
    lines = [json.dumps({"text": text}) for text in paragraphs if text.strip()]
    (folder / "paragraphs.jsonl").write_text("\n".join(lines))
    tokenize([str(folder / "paragraphs.jsonl")], str(corpus / "tokenizer"), str(folder / "tokenized"))
    pack([str(folder / "tokenized")], SEQUENCE_LENGTH, str(folder / "train"), seed=1)
    return folder / "train"


@pytest.fixture
def runs(corpus: Path, packs: Path, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # over one rank it moves nothing, and gloo's would copy outside of any operator
    monkeypatch.setattr(param_and_grad_buffer, "dist_reduce_scatter_func", lambda *_, **__: None)
    made = []

    def run(is_recorded: bool, attention: AttentionChoice | None = None, **changes: Any) -> Any:
        settings = {"precision": {"dtype": "bf16"}, "model__num_layers": 2} | changes
        fields = experiment_fields(corpus, tmp_path / str(len(made)), STEPS - FIRST + 1, **settings)
        fields["stages"][0]["tokens"] = FIRST * 8 * SEQUENCE_LENGTH
        for stage in fields["stages"]:
            stage["data"] = [{"path": str(packs)}]
        made.append(on_this_rank(fields))
        use_attention(made[-1].chunks, attention or AttentionChoice("torch_varlen", "torch_varlen"))
        made[-1].recorded = RecordedSteps(StandIn) if is_recorded else None
        return made[-1]

    yield run
    for one in made:
        one.loader.close()


def numbers(run: Any, steps: range = range(STEPS), validate_after: int = -1) -> list[Any]:
    """Loss, gradient norm and router statistics of every step, and the sum of all weights after it."""
    found = []
    for step in steps:
        stage = run.schedule.stage(step)
        apply_learning_rate(run, step)
        result = train_step(run, stage, step)
        statistics = torch.cat([part.flatten() for part in result.statistics]).tolist()
        weights = sum(weight.double().sum().item() for model in run.chunks for weight in model.parameters())
        found.append((result.loss, result.grad_norm, result.num_target_tokens, statistics, weights))
        if step == validate_after:
            found.append(evaluate(run, stage, run.evaluation))
    return found


CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "top 2, dropping": {
        "model__moe_router_topk": 2,
        "model__recycle_routing": False,
        "model__moe_z_loss_coeff": 0.1,
    },
    "recomputed groups": {
        "model__num_layers": 4,
        "parallel": {"recompute": "cla_group"},
        "model__share_embeddings_and_output_weights": False,
    },
    "recomputed experts, overlapped reduction": {"parallel": {"recompute": "selective", "overlap_grad_reduce": True}},
    "recomputed parts": {"parallel": {"recompute": "swiglu+norms"}},
    "plain optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "delayed": {"precision": {"dtype": "bf16", "fp8_recipe": "delayed"}},
    "blockwise, recomputed": {
        "precision": {"dtype": "bf16", "fp8_recipe": "blockwise"},
        "parallel": {"recompute": "cla_group"},
    },
    "tensorwise": {"precision": {"dtype": "bf16", "fp8_recipe": "tensorwise"}},
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_equal_computed_ones(runs: Any, name: str) -> None:
    """Two stages of packed documents, 4 micro-batches a step; bitwise."""
    expected = numbers(runs(False, **CASES[name]))
    run = runs(True, **CASES[name])
    assert len(documents_of(run)) > 3, "steps should differ in their documents"
    assert numbers(run) == expected
    assert len({norm for _, norm, *_ in expected}) == STEPS


def documents_of(run: Any) -> set[tuple[int, ...]]:
    steps = range(STEPS)
    return {tuple(batch.cu_seqlens.tolist()) for step in steps for batch in run.loader.micro_batches(step)}


def test_a_graph_serves_a_stage_and_is_freed_at_the_next(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StandIn] = []
    monkeypatch.setattr(StandIn, "__init__", remembered(made))
    run = runs(True)
    numbers(run)
    assert [graph.num_replays for graph in made] == [FIRST - COMPUTED, STEPS - FIRST - COMPUTED]
    assert all(len(graph.recording) > 500 for graph in made)
    run.recorded.close()
    assert run.recorded._memory is None
    assert run.recorded._graph is None


def remembered(made: list[StandIn]) -> Any:
    before = StandIn.__init__

    def init(self: StandIn) -> None:
        before(self)
        made.append(self)

    return init


def test_the_room_for_documents_is_that_of_the_stage(runs: Any, packs: Path) -> None:
    """So all ranks record the same step, and a run that resumes has the kernels that the run so far had."""
    run = runs(True)
    order, index = run.loader.order, run.loader.order.datasets[str(packs)].index
    assert index.manifest["most_pieces"] == index.most_pieces == np.diff(index.sequence_offsets).max() > 2
    assert {order.most_documents(step) for step in range(STEPS)} == {2 * (index.most_pieces + 1)}
    needed = [len(batch.cu_seqlens) - 1 for step in range(STEPS) for batch in run.loader.micro_batches(step)]
    assert max(needed) <= order.most_documents(0)
    del index.manifest["most_pieces"]  # as in folders packed before it was written
    del index.__dict__["most_pieces"]
    assert order.most_documents(0) == 2 * (int(np.diff(index.sequence_offsets).max()) + 1)


def test_validation_between_replays_changes_nothing(runs: Any, corpus: Any) -> None:
    held_out = {"evaluation__data": str(corpus / "heldout"), "evaluation__max_sequences": 4}
    plain, recorded = (numbers(runs(which, **held_out), validate_after=5) for which in (False, True))
    assert recorded == plain
    assert len(plain) == STEPS + 1


def test_a_run_that_starts_in_the_middle_records_anew(runs: Any) -> None:
    """As a resumed one does: with the state of the run so far, any step can be the first."""
    run, other = runs(True), runs(False)
    expected = numbers(other)
    assert numbers(run, range(5)) == expected[:5]
    run.recorded = RecordedSteps(StandIn)
    assert numbers(run, range(5, STEPS)) == expected[5:]


def test_the_attention_of_all_backends_sees_the_same_documents(runs: Any) -> None:
    """The stand-in computes what the backend that runs on a CPU does, within bf16's rounding."""
    loss = numbers(runs(True), range(1))[0][0]
    assert loss == pytest.approx(numbers(runs(False, PER_DOCUMENT), range(1))[0][0], rel=2**-8)


# --- what must not be recorded ----------------------------------------------------------------------------------------


def test_a_step_that_reads_on_the_host_is_refused(runs: Any) -> None:
    run = runs(True, model__moe_expert_capacity_factor=None, model__recycle_routing=False)
    with pytest.raises(TrainingError, match=r"step 3 cannot be recorded as a CUDA graph: .*runtime\.cuda_graphs=false"):
        numbers(run)


def test_a_copy_from_host_memory_is_refused(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would read whatever is there by then, without an error."""
    run, work = runs(True), recorded_step.forward_and_backward

    def with_copy(*args: Any, **kwargs: Any) -> Any:
        handover.to_device(torch.zeros(3), run.device)
        return work(*args, **kwargs)

    monkeypatch.setattr(recorded_step, "forward_and_backward", with_copy)
    with pytest.raises(TrainingError, match=r"step 3 cannot be recorded.*would copy 3 numbers"):
        numbers(run)
    assert handover.to_device(torch.zeros(3), run.device).numel() == 3


def test_a_key_taken_from_python_repeats_the_draw_of_the_recorded_step(
    runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stand-in would find."""
    expected, run, routing = numbers(runs(False), range(FIRST)), runs(True), recorded_step.routing_of

    def from_python(*args: Any) -> Any:
        return routing(*args)._replace(key_L=None)

    monkeypatch.setattr(recorded_step, "routing_of", from_python)
    actual = numbers(run, range(FIRST))
    assert actual[:3] == expected[:3]
    assert actual[3] != expected[3]
