"""The choice of attention backends before the first step. The kernels are stand-ins, and their times are given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.config.attention import PER_DOCUMENT, AttentionChoice
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import write_history
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.rules import find_problems
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.attention_backends import BUILDERS, ByMicroBatch, CoreAttention, Heads, use_attention
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.packed_attention import batched_attention, document_blocks, packed_attention
from hunyuan_pretrain.model.varlen_attention import Documents
from hunyuan_pretrain.train import attention_choice, preflight, resume
from hunyuan_pretrain.train.attention_check import Compared
from hunyuan_pretrain.train.preflight import attention_trials
from tests.helpers import flash_attention_stub
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields
from tests.helpers.tiny import build, packed_inputs, tiny_model
from tests.unit.runtime.test_device import BF16, DEMO, MACHINE

PACKED = [0, 25, 32, 50, 64, 128, 150, 256]
UNIFORM = [0, 128, 256]
MILLISECONDS = {
    "cudnn": 5.0,
    "flash_attn_3": 3.0,
    "flash_attn_2": 6.0,
    "torch_varlen": 4.0,
    "per_document": 9.0,
    "cudnn_batched": 2.0,
    "torch_batched": 2.5,
}
RECORDED = {"packed": "flash_attn_2", "uniform": "torch_batched"}
BOTH_FLASH = dataclasses.replace(MACHINE, flash_attn="2.8.3", flash_attn_3="3.0.0")


class Backend:
    """A backend that can be told apart, and that computes what `attend` computes."""

    def __init__(self, name: str, attend: CoreAttention) -> None:
        self.name, self.attend = name, attend

    def __call__(self, *inputs: Any) -> Tensor:
        return self.attend(*inputs)


def noisy(*inputs: Any) -> Tensor:
    """Right within rounding, but the last bit varies from call to call."""
    out = packed_attention(*inputs)
    return out * torch.where(torch.rand(out.shape) < 0.5, 1.0, 1.0 + 2**-7).to(out.dtype)


def failing(*inputs: Any) -> Tensor:
    raise RuntimeError("CUDA out of memory\nmore")


def out_of_memory(*inputs: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def misled(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    return packed_attention(q, k.roll(1, 0), v, blocks)


@pytest.fixture(autouse=True)
def machine_of_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch.setattr, monkeypatch.setitem, {})


def set_up(setattr_: Callable[..., None], setitem: Callable[..., None], others: Mapping[str, CoreAttention]) -> None:
    """Every backend computes what per_document does, but for `others`, and takes MILLISECONDS."""
    for name in BUILDERS:
        right = batched_attention if name == "torch_batched" else packed_attention
        setitem(BUILDERS, name, lambda heads, name=name, right=right: Backend(name, others.get(name, right)))
    setattr_(attention_choice, "_milliseconds", lambda attend, qkv, case: MILLISECONDS[attend.name])


def chosen(
    *overrides: str,
    machine: Any = BOTH_FLASH,
    cu_seqlens: list[int] | None = None,
    recorded: Mapping[str, str] | None = None,
    ranks: tuple[int, int] = (0, 1),
    room: int = 0,
) -> tuple[AttentionChoice, str]:
    experiment = load_experiment(DEMO, (BF16, *overrides))
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision)
    batch = batch_of(cu_seqlens or PACKED)
    choice, lines = attention_choice.choose(
        experiment, machine, config, batch, ranks, torch.device("cpu"), recorded or {}, room
    )
    return choice, "\n".join(lines)


def batch_of(cu_seqlens: list[int]) -> MicroBatch:
    """Two sequences of 128 tokens."""
    tokens = torch.zeros(256, dtype=torch.int64)
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32)
    return MicroBatch(tokens, tokens, torch.ones(256), tokens, boundaries, longest, torch.arange(2))


def test_the_fastest_backend_is_taken_for_each_kind_of_micro_batch() -> None:
    choice, lines = chosen()
    assert choice == ("flash_attn_3", "cudnn_batched")
    assert lines.splitlines()[0] == (
        "attention of packs: flash_attn_3 (cudnn 5.00, flash_attn_3 3.00, flash_attn_2 6.00, torch_varlen 4.00, "
        "per_document 9.00 ms, forward and backward)"
    )
    assert chosen(machine=MACHINE)[0] == ("torch_varlen", "cudnn_batched")
    assert chosen("runtime.transformer_engine=never")[0] == ("flash_attn_3", "torch_batched")


def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MILLISECONDS, "cudnn", 3.1)
    assert chosen()[0].packed == "cudnn"
    monkeypatch.setitem(MILLISECONDS, "cudnn", 3.2)
    assert chosen()[0].packed == "flash_attn_3"


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (misled, "its output is wrong here by"),
        (lambda *inputs: packed_attention(*inputs).detach().requires_grad_(), "it fails: RuntimeError: "),
        (noisy, "its output, gradient of q, gradient of k, gradient of v vary from run to run"),
        (failing, "it fails: RuntimeError: CUDA out of memory"),
    ],
)
def test_a_backend_that_is_wrong_here_is_out(
    attend: CoreAttention, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch.setattr, monkeypatch.setitem, {"flash_attn_3": attend})
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        choice, lines = chosen()
        assert choice.packed == "torch_varlen"
        assert f"attention of packs: not flash_attn_3: {reason}" in lines
        with pytest.raises(ConfigError, match=r"runtime\.attention_backend=flash_attn_3: flash_attn_3: " + reason[:8]):
            chosen("runtime.attention_backend=flash_attn_3")
        torch.use_deterministic_algorithms(False)
        assert (chosen()[0].packed == "flash_attn_3") == (attend is noisy)
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_name_overrides_the_measurement() -> None:
    assert chosen("runtime.attention_backend=per_document")[0] == PER_DOCUMENT
    assert chosen("runtime.attention_backend=cudnn")[0] == ("cudnn", "cudnn")
    assert chosen("runtime.attention_backend=torch_batched")[0] == ("flash_attn_3", "torch_batched")


def test_a_recorded_choice_is_kept_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, lines = chosen(recorded=RECORDED)
    assert choice._asdict() == RECORDED
    assert lines == (
        "attention of packs: flash_attn_2 (as in the run so far)\n"
        "attention of documents of one length: torch_batched (as in the run so far)"
    )
    assert chosen("runtime.attention_backend=cudnn", recorded=RECORDED)[0] == ("cudnn", "cudnn")


@pytest.mark.parametrize(
    ("attend", "without", "reason"),
    [
        (misled, "", "its output is wrong here by "),
        (lambda *inputs: packed_attention(*inputs).detach().requires_grad_(), "", "it fails: RuntimeError: "),
        (packed_attention, "flash_attn", "flash-attn is not installed"),
    ],
    ids=["wrong", "raises", "missing"],
)
def test_a_recorded_backend_that_cannot_be_kept_stops_the_run(
    attend: CoreAttention, without: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch.setattr, monkeypatch.setitem, {"flash_attn_2": attend})
    machine = dataclasses.replace(BOTH_FLASH, **{without: None} if without else {})
    with pytest.raises(ConfigError) as caught:
        chosen(recorded=RECORDED, machine=machine)
    (problem,) = caught.value.problems
    assert problem.path == "runtime.attention_backend"
    so_far = "the run has computed attention of packs with flash_attn_2 so far, and cannot here: "
    assert problem.rule.startswith(so_far + reason)
    assert problem.hint == (
        "to go on with another, set runtime.attention_backend to cudnn or flash_attn_3 or torch_varlen or "
        "per_document; the history records it"
    )
    # as the message says
    another = chosen("runtime.attention_backend=torch_varlen", recorded=RECORDED, machine=machine)
    assert another[0] == ("torch_varlen", "torch_varlen")
    # the other kind is kept with a backend of that kind, and is none of this setting's concern
    named = {"packed": "torch_varlen", "uniform": "flash_attn_2"}
    with pytest.raises(ConfigError, match="documents of one length with flash_attn_2 so far") as caught:
        chosen(recorded=named, machine=machine)
    assert "per_document or cudnn_batched or torch_batched;" in str(caught.value)
    batched = chosen("runtime.attention_backend=torch_batched", recorded=named, machine=machine)
    assert batched[0] == ("torch_varlen", "torch_batched")


@pytest.mark.parametrize("attend", [out_of_memory, failing])
def test_a_recorded_backend_without_memory_for_its_trial_is_kept_untried(
    attend: CoreAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is out of a choice that nothing fixes."""
    set_up(monkeypatch.setattr, monkeypatch.setitem, {"flash_attn_2": attend, "flash_attn_3": attend})
    choice, lines = chosen(recorded=RECORDED)
    assert choice._asdict() == RECORDED
    kept = lines.splitlines()[0]
    assert kept.startswith("attention of packs: flash_attn_2 (as in the run so far; not tried: it fails: ")
    assert "CUDA out of memory" in kept
    assert "more" not in kept
    assert chosen()[0].packed == "torch_varlen"


def test_a_trial_that_leaves_the_gpu_unusable_ends_this_rank_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot tell the others: it must not try to, nor wait for them."""

    def reading_a_wrong_address(*inputs: Any) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nFor debugging consider")

    def dead(device: torch.device) -> None:
        if tried[-1] == "flash_attn_3":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    tried: list[str] = []
    set_up(monkeypatch.setattr, monkeypatch.setitem, {"flash_attn_3": reading_a_wrong_address})
    real = attention_choice.trial
    monkeypatch.setattr(attention_choice, "trial", lambda name, case: [tried.append(name), real(name, case)][1])
    monkeypatch.setattr(attention_choice, "give_back", dead)
    monkeypatch.setattr(attention_choice, "worst_of_ranks", lambda mine: pytest.fail("it tells others"))
    with pytest.raises(ConfigError) as caught:
        chosen()
    assert tried == ["cudnn", "flash_attn_3"]
    assert str(caught.value) == (
        "this machine: 1 problem\n  runtime.attention_backend: flash_attn_3 has left the GPU of this rank unusable: it "
        "fails: AcceleratorError: CUDA error: an illegal memory access was encountered (set another one)"
    )


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is on, as containers may ask for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("is_failing", [False, True])
def test_the_reference_of_a_trial_is_not_rounded_to_tf32(is_failing: bool, tf32: None) -> None:
    seen: list[tuple[str, bool]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, who: str) -> Tensor:
            ctx.who = who
            seen.append((f"{who} forward", torch.backends.cuda.matmul.allow_tf32))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            seen.append((f"{ctx.who} backward", torch.backends.cuda.matmul.allow_tf32))
            if is_failing and ctx.who == "reference":
                raise RuntimeError("no such kernel")
            return grad, None

    def watched(who: str) -> CoreAttention:
        return lambda q, k, v, blocks: Watched.apply(packed_attention(q, k, v, blocks), who)

    inputs = [torch.randn(8, 2, 16) for _ in range(3)]
    compared = Compared(watched("backend"), watched("reference"))
    with pytest.raises(RuntimeError, match="no such kernel") if is_failing else nullcontext():
        compared(*inputs, document_blocks([0, 3, 8]))
    assert seen == [
        ("backend forward", True), ("backend backward", True), ("reference forward", False),
        ("reference backward", False),
    ]  # fmt: skip
    assert torch.backends.cuda.matmul.allow_tf32
    # one that is compared with itself, to see whether it varies, runs twice as it is
    seen.clear()
    itself = watched("itself")
    Compared(itself, itself)(*inputs, document_blocks([0, 3, 8]))
    assert [is_on for _, is_on in seen] == [True] * 4


class Again:
    """Stands in for a CUDA graph: a replay calls the work again."""

    def record(self, work: Callable[[], Any]) -> Any:
        self.work, self.results = work, work()
        return self.results

    def replay(self) -> None:
        for result, new in zip(self.results, self.work(), strict=True):
            result.copy_(new)


def test_a_recorded_step_is_tried_as_it_will_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With boundaries in memory, room for more documents, and one backend for all micro-batches."""
    seen: list[Documents] = []

    def from_memory(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
        if not isinstance(documents, Documents):  # beside the reference
            return packed_attention(q, k, v, documents)
        seen.append(documents)
        return packed_attention(q, k, v, document_blocks(documents.cu_seqlens_q.unique_consecutive().tolist()))

    set_up(monkeypatch.setattr, monkeypatch.setitem, dict.fromkeys(MILLISECONDS, from_memory))
    monkeypatch.setattr(attention_choice, "_milliseconds", lambda attend, qkv, case: 1.0)
    monkeypatch.setattr(attention_choice, "make_graph", Again)
    choice, lines = chosen("runtime.cuda_graphs=true", room=12)
    assert choice == ("cudnn", "cudnn")
    assert "one length" not in lines
    assert {len(documents.cu_seqlens_q) for documents in seen} == {13}
    assert {documents.longest_q for documents in seen} == {128}
    # a graph with the boundaries of the step that was recorded
    monkeypatch.setattr(Again, "replay", lambda self: None)
    with pytest.raises(ConfigError, match="recorded, it does not follow the documents of later steps"):
        chosen("runtime.cuda_graphs=true", room=12)


def test_where_ranks_gather_keys_there_is_one_kind_of_micro_batch() -> None:
    gathered = ("parallel.context_parallel_size=2", "parallel.world_size=2", "model.moe_routing_group_tokens=32")
    for rank in (0, 1):
        assert chosen(*gathered, ranks=(rank, 2))[0] == ("flash_attn_3", "flash_attn_3")
    traded = (*gathered, "parallel.context_parallel_method=all_to_all")
    assert chosen(*traded, ranks=(1, 2))[0] == ("flash_attn_3", "cudnn_batched")


@pytest.mark.parametrize("cu_seqlens", [PACKED, UNIFORM])
def test_both_kinds_are_measured_whatever_the_first_micro_batch_is(cu_seqlens: list[int]) -> None:
    experiment = load_experiment(DEMO, (BF16,))
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision)
    device, batch = torch.device("cpu"), batch_of(cu_seqlens)
    cases = [
        attention_choice.case_of(experiment, config, batch, (0, 1), device, kind) for kind in ("packed", "uniform")
    ]
    found = [[0, *(block.k_end for block in case.blocks)] for case in cases]
    assert found[1] == UNIFORM
    assert found[0] == (PACKED if cu_seqlens == PACKED else [0, 16, 48, 64, 128, 144, 176, 192, 256])
    assert all(case.num_keys == 256 for case in cases)
    # documents of one length that do not fill their sequences are uniform too
    assert attention_choice.cu_seqlens_of(batch_of([0, 64, 128, 192, 256]), "uniform") == [0, 64, 128, 192, 256]


def test_long_sequences_are_measured_with_fewer_heads() -> None:
    all_heads = Heads(80, 8, 80)
    assert attention_choice._measured_heads(all_heads, document_blocks([0, 4096, 8192])) == all_heads
    assert attention_choice._measured_heads(all_heads, document_blocks([0, 2**15])) == Heads(10, 1, 80)
    assert attention_choice._measured_heads(all_heads, document_blocks([0, 2**18])) == Heads(10, 1, 80)


def test_a_measurement_times_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    experiment = load_experiment(DEMO, (BF16,))
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision)
    case = attention_choice.case_of(experiment, config, batch_of(PACKED), (0, 1), torch.device("cpu"), "packed")
    with flash_attention_stub.everything():
        found = {name: attention_choice.trial(name, case) for name in ("torch_varlen", "flash_attn_2", "per_document")}
        # as whatever test ran before has left it
        assert ("torch_varlen", torch.are_deterministic_algorithms_enabled()) in flash_attention_stub.calls
    assert all(0 < trial.milliseconds < 10_000 and not trial.reason for trial in found.values()), found
    absent = attention_choice.trial("cudnn", case)
    assert math.isinf(absent.milliseconds)
    assert absent.reason.startswith("it fails: ModuleNotFoundError: ")


def test_doctor_tries_what_a_run_would_take(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = experiment_fields(corpus, tmp_path / "run")
    fields |= {"precision": {"dtype": "bf16"}, "runtime": {}}
    experiment = Experiment.model_validate(fields)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        rows, failed = attention_trials(experiment, BOTH_FLASH, "cpu")
        assert failed == []
        assert rows[0][0] == "attention of packs"
        assert rows[0][1].startswith("flash_attn_3 (cudnn 5.00, ")
        # a run without a checkpoint starts again; one with a checkpoint keeps its backends, or stops
        begun = resume.begin(experiment, {"sources": {}, "tokenizer_digest": "d", "versions": {}}).history[0]
        begun = begun.model_copy(update={"attention": {"packed": "flash_attn_2", "uniform": "cudnn_batched"}})
        write_history(tmp_path / "run", [begun])
        assert attention_trials(experiment, BOTH_FLASH, "cpu") == (rows, [])
        monkeypatch.setattr(preflight.save_load, "find_checkpoints", lambda run_dir: [tmp_path])
        marker = {"step": 3, "history": [begun.model_dump(mode="json")]}
        monkeypatch.setattr(preflight.save_load, "read_marker", lambda folder: marker)
        rows, failed = attention_trials(experiment, BOTH_FLASH, "cpu")
        assert (rows[0], failed) == (("attention of packs", "flash_attn_2 (as in the run so far)"), [])
        rows, failed = attention_trials(experiment, MACHINE, "cpu")
        assert "the run has computed attention of packs with flash_attn_2 so far" in failed[0]
        monkeypatch.setattr(preflight.save_load, "find_checkpoints", lambda run_dir: [])
        fields["runtime"] = {"attention_backend": "flash_attn_2"}
        rows, failed = attention_trials(Experiment.model_validate(fields), MACHINE, "cpu")
        assert rows == []
        assert "runtime.attention_backend=flash_attn_2: flash_attn_2: flash-attn is not installed" in failed[0]
    finally:
        torch.use_deterministic_algorithms(before)


# --- all ranks take the same ------------------------------------------------------------------------------------------


def on_a_rank() -> list[Any]:
    """Backends are slower or wrong on one of two ranks; what this rank chooses, in each case."""
    import torch.distributed as dist

    from hunyuan_pretrain.parallel.groups import initialize_distributed

    initialize_distributed("gloo", 60)
    found: list[Any] = []
    set_up(setattr, lambda mapping, key, value: mapping.update({key: value}), {})
    if dist.get_rank() == 1:
        MILLISECONDS["flash_attn_3"] = 7.0
    found.append(chosen(cu_seqlens=PACKED if dist.get_rank() else UNIFORM)[0])
    recorded = {"packed": "torch_varlen", "uniform": "torch_batched"}
    if dist.get_rank() == 1:
        set_up(setattr, lambda mapping, key, value: mapping.update({key: value}), {"torch_varlen": out_of_memory})
    found.append(chosen()[0])
    found.append(chosen(recorded=recorded))
    for others, arguments in (({}, {"recorded": recorded}), ({"torch_varlen": misled}, {"recorded": recorded})):
        if dist.get_rank() == 0:  # rank 1 has no memory
            set_up(setattr, lambda mapping, key, value: mapping.update({key: value}), others)
        try:
            found.append(chosen(**arguments)[0])
        except ConfigError as error:
            found.append(str(error))
    try:
        chosen("runtime.attention_backend=torch_varlen")
    except ConfigError as error:
        found.append(str(error))
    return found


def test_all_ranks_take_the_same_backends() -> None:
    first, second = fork_ranks(2, on_a_rank)
    assert first == second
    assert first[:2] == [("torch_varlen", "cudnn_batched"), ("cudnn", "cudnn_batched")]
    choice, lines = first[2]
    assert choice == ("torch_varlen", "torch_batched")
    memory = "on rank 1: it fails: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert lines.splitlines()[0] == f"attention of packs: torch_varlen (as in the run so far; not tried: {memory})"
    assert first[3] == choice
    assert "cannot here: on rank 0: its output is wrong here by" in first[4], "want of memory excuses nothing else"
    assert "torch_varlen: on rank 0: its output is wrong here by" in first[5]


# --- in the model, and in the history of the run ----------------------------------------------------------------------


def test_every_layer_gets_the_choice() -> None:
    model = build(tiny_model())
    attentions = [layer.self_attention for layer in model.decoder.layers]
    assert all(attention.core_attention.name == "per_document" for attention in attentions)
    use_attention([model], AttentionChoice("torch_varlen", "torch_batched"))
    for attention in attentions:
        assert isinstance(attention.core_attention, ByMicroBatch)
        assert attention.core_attention.packed.name == "torch_varlen"
    assert str(model.config.attention) == (
        "torch_varlen, and torch_batched where all documents of a micro-batch have the same length"
    )


def test_the_batched_backend_trains_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, inputs = tiny_model(), packed_inputs(tiny_model(), (32, 32, 32))
    results = []
    for choice in (PER_DOCUMENT, AttentionChoice("per_document", "torch_batched")):
        whole = build(model)
        use_attention([whole], choice)
        loss, _ = whole(inputs)
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in whole.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # fp32 sums in another order


def settled(start: resume.Start, monkeypatch: pytest.MonkeyPatch, choice: AttentionChoice | None) -> resume.Start:
    """The start after the choice; None: on a CPU."""
    device: Any = SimpleNamespace(type="cpu" if choice is None else "cuda")
    asked: list[Any] = []
    monkeypatch.setattr(attention_choice, "use_attention", lambda chunks, taken: asked.append(taken))
    monkeypatch.setattr(attention_choice, "probe", lambda: MACHINE)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(attention_choice, "choose", lambda *arguments, room: (choice, [f"of {arguments[-1]}"]))
    loader: Any = SimpleNamespace(num_steps=9, micro_batches=lambda step: [batch_of(PACKED)])
    groups: Any = SimpleNamespace(cp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    model: Any = SimpleNamespace(config=None)
    experiment = load_experiment(DEMO, (BF16,))
    found = attention_choice.settle(experiment, groups, [model], loader, device, start)
    assert asked == ([] if choice is None else [choice])
    return found


def test_the_choice_is_recorded_and_a_change_of_it_starts_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(DEMO, (BF16,))
    met = {"world_size": 2, "sources": {}, "tokenizer_digest": "d", "versions": {}}
    fresh = resume.begin(experiment, met)
    assert settled(fresh, monkeypatch, None) == fresh, "nothing is recorded on a CPU"

    cudnn, flash = AttentionChoice("cudnn", "cudnn_batched"), AttentionChoice("flash_attn_2", "cudnn_batched")
    started = settled(fresh, monkeypatch, cudnn)
    assert started.history[0].attention == {"packed": "cudnn", "uniform": "cudnn_batched"}
    assert started.history[0].changes == []
    assert started.lines == ("  of {}",)

    resumed = resume.Start(started.history, 3, False, ())
    same = settled(resumed, monkeypatch, cudnn)
    assert (same.history, same.is_new_segment) == (started.history, False)
    assert same.lines == ("  of {'packed': 'cudnn', 'uniform': 'cudnn_batched'}",)

    other = settled(resumed, monkeypatch, flash)
    assert other.is_new_segment
    assert [segment.first_step for segment in other.history] == [0, 3]
    assert other.history[1].attention == flash._asdict()
    change = "attention.packed: cudnn -> flash_attn_2 (which kernels compute attention; they round differently)"
    assert other.history[1].changes == [change]
    assert f"  changed, and recorded: {change}" in other.lines

    older = resume.Start(fresh.history, 3, False, ())
    found = settled(older, monkeypatch, cudnn)
    assert [segment.first_step for segment in found.history] == [0, 3]
    assert found.is_new_segment
    assert found.history[0].attention == {}
    unknown = "attention.packed: (not recorded) -> cudnn (which kernels compute attention; they round differently)"
    assert found.history[1].changes[0] == unknown
    assert f"  changed, and recorded: {unknown}" in found.lines

    moved = settled(resumed, monkeypatch, None)
    assert moved.history[1].attention == {}
    assert "attention.packed: cudnn -> (absent)" in moved.history[1].changes[0]

    changed = resume.Start((*started.history, fresh.history[0].model_copy(update={"first_step": 3})), 3, True, ())
    after = settled(changed, monkeypatch, flash)
    assert after.lines[-1] == "  of {'packed': 'cudnn', 'uniform': 'cudnn_batched'}"
    assert len(after.history) == 2
    assert after.history[1].changes == [change]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ("runtime.attention_backend=cudnn", "runtime.device=cpu", BF16),
            "it runs on CUDA devices only (use per_document, or auto)",
        ),
        (
            ("runtime.attention_backend=flash_attn_2", "precision.dtype=fp32"),
            "it computes in bf16, not in fp32 (use per_document, or auto)",
        ),
        (
            ("runtime.attention_backend=cudnn", "runtime.transformer_engine=never", BF16),
            "transformer-engine is not used (use torch_varlen, or auto)",
        ),
        (
            ("runtime.attention_backend=torch_batched", "parallel.context_parallel_size=2", BF16),
            "it takes as many queries as keys, but with context parallelism by all_gather a rank has more keys "
            "(use auto)",
        ),
        (
            ("runtime.attention_backend=torch_varlen", "model.kv_channels=20", BF16),
            "head widths are multiples of 8 up to 256, not 20 (use per_document, or auto)",
        ),
        (("runtime.attention_backend=per_document", "runtime.device=cpu"), None),
        (("runtime.attention_backend=flash_attn_3", BF16), None),
        (("runtime.attention_backend=cudnn_batched", BF16), None),
    ],
)
def test_settings_that_exclude_a_named_backend(overrides: tuple[str, ...], rule: str | None) -> None:
    experiment = load_experiment(DEMO, ())
    found = find_problems(changed(experiment, overrides))
    mine = [str(problem) for problem in found if problem.path == "runtime.attention_backend"]
    name = overrides[0].partition("=")[2]
    assert mine == ([] if rule is None else [f"runtime.attention_backend={name}: {rule}"])


def changed(experiment: Any, overrides: tuple[str, ...]) -> Any:
    """The experiment with these settings, unchecked."""
    fields = experiment.model_dump()
    for override in overrides:
        path, value = override.split("=")
        section, key = path.split(".")
        fields[section][key] = int(value) if value.isdecimal() else value
    return type(experiment).model_validate(fields)
