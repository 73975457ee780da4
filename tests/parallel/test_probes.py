"""The probes before training: they pass under every kind of layout, and each planted bug stops the run with its
reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Layout
from tests.helpers.ranks import fork_ranks, run_ranks
from tests.helpers.transformer_engine_cases import Case, probed

pytestmark = pytest.mark.slow
Bug = Callable[[], AbstractContextManager[Any]]


def attention_across_documents() -> AbstractContextManager[Any]:
    """Document boundaries are ignored: the pack is one document."""
    from hunyuan_pretrain.model import attention

    right = attention.document_blocks
    return patch.object(attention, "document_blocks", lambda cu_seqlens: right([cu_seqlens[0], cu_seqlens[-1]]))


def gathered_attention_across_documents() -> AbstractContextManager[Any]:
    from hunyuan_pretrain.model import attention

    right = attention.context_blocks
    return patch.object(
        attention, "context_blocks", lambda cu_seqlens, ranges: right([cu_seqlens[0], cu_seqlens[-1]], ranges)
    )


def router_losses_times_two() -> AbstractContextManager[Any]:
    """As in a layout that counts only its own rank's routing groups."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    right = MoEAuxLossAutoScaler.set_loss_scale
    return patch.object(MoEAuxLossAutoScaler, "set_loss_scale", staticmethod(lambda scale: right(scale * 2)))


def balance_loss_without_gradient() -> AbstractContextManager[Any]:
    from hunyuan_pretrain.model.experts import MoEAuxLossAutoScaler

    return patch.object(MoEAuxLossAutoScaler, "apply", lambda weight, loss: weight)


def combination_without_router() -> AbstractContextManager[Any]:
    """The experts' output is weighted by a constant, so the cross-entropy has no gradient for the router."""
    from hunyuan_pretrain.model import permutation

    right = permutation._Combine.apply
    return patch.object(permutation._Combine, "apply", lambda rows, weight, plan: right(rows, weight.detach(), plan))


def rows_of_another_document() -> AbstractContextManager[Any]:
    """Keys and values of a document are shifted by one row, in the forward pass only."""
    from hunyuan_pretrain.model import packed_attention

    right = packed_attention._flash_cpu
    return patch.object(
        packed_attention, "_flash_cpu", lambda q, k, v, is_causal: right(q, k.roll(1, 2), v.roll(1, 2), is_causal)
    )


@contextmanager
def kernel_wrong_on_another_rank() -> Iterator[None]:
    """Rank 0, whose kernels are right, has to stop as well."""
    import torch.distributed as dist

    from hunyuan_pretrain.model import kernels
    from hunyuan_pretrain.model.functions import plain_functions
    from hunyuan_pretrain.train import chunks

    plain = plain_functions()
    wrong = plain._replace(swiglu=lambda x_TF: plain.swiglu(x_TF) * (1.0 + 0.01 * dist.get_rank()))
    with (
        patch.object(chunks, "uses_kernels", lambda machine, experiment: True),
        patch.object(kernels, "kernel_functions", lambda: wrong),
    ):
        yield


RIGHT_ATTENTION = (
    r"probe: attention by flash attention matches a plain softmax, forward and backward \(largest .* difference "
    r".*e-07\)"
)
HEALTHY = [
    Layout(),
    Layout(tp=2, ep=2, recompute="cla_group"),
    Layout(cp=2, model="top 2", recompute="selective+norms", offload=2),
    Layout(cp=2, model="4 key/value heads", attention="all_to_all", optimizer="plain"),
    Layout(pp=2, vpp=2, micro_batch=1),
    Layout(dp=2, ep=2, overlap="everything", model="dropless"),
]
BROKEN: dict[Bug, tuple[Layout, str]] = {
    rows_of_another_document: (
        Layout(dp=2),
        "attention by flash attention does not match a plain softmax on the same queries, keys and",
    ),
    attention_across_documents: (Layout(dp=2), "documents of a pack see each other: changing one changed"),
    gathered_attention_across_documents: (Layout(cp=2), "documents of a pack see each other: changing one changed"),
    router_losses_times_two: (
        Layout(tp=2),
        "the balance loss acts with coefficient 0.02, but 0.01 is declared: this layout scales it",
    ),
    balance_loss_without_gradient: (
        Layout(dp=2),
        "the balance loss has no gradient on the router of layer 0 (8 of 8 layers)",
    ),
    combination_without_router: (
        Layout(pp=2),
        "the cross-entropy has no gradient on the router of layer 0 (8 of 8 layers)",
    ),
    kernel_wrong_on_another_rank: (
        Layout(dp=2),
        "Triton kernels do not match the plain functions on random inputs in the sizes of this run: swiglu by 0.01 "
        "(rank 1: gradient of argument 1 by 0.01); rounding explains",
    ),
}


def probe_all(work: list[tuple[Bug, Experiment]]) -> list[Any]:
    """What the probes report before each run, and whether any gradient remains; or their refusal."""
    from hunyuan_pretrain.train import TrainingError, setup
    from hunyuan_pretrain.train.probes import probe

    def lines(job: tuple[Bug, Experiment]) -> Any:
        bug, experiment = job
        with bug():
            run = setup.prepare(experiment)
            try:
                found = probe(run)
                left = [
                    name
                    for model in run.chunks
                    for name, parameter in model.named_parameters()
                    if parameter.main_grad.any()
                ]
                return found, left
            except TrainingError as error:
                return str(error)
            finally:
                setup.leave(run)

    return [lines(job) for job in work]


@pytest.fixture(scope="module")
def answers(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What rank 0 reported, by healthy layout or by bug."""
    folder, found = tmp_path_factory.mktemp("probes"), {}
    cases: list[tuple[Any, Bug, Layout]] = [(layout, nullcontext, layout) for layout in HEALTHY]
    cases += [(bug, bug, layout) for bug, (layout, _) in BROKEN.items()]
    for world_size in (1, 2):
        mine = [case for case in cases if case[2].world_size == world_size]
        work = [
            (bug, layout.experiment(corpus, folder / f"{world_size}_{number}"))
            for number, (_, bug, layout) in enumerate(mine)
        ]
        found |= {
            key: answer for (key, _, _), answer in zip(mine, fork_ranks(world_size, probe_all, work)[0], strict=True)
        }
    return found


@pytest.mark.parametrize("layout", HEALTHY, ids=str)
def test_probes_report_what_they_found_and_leave_no_gradient(answers, layout):
    assert not isinstance(answers[layout], str), answers[layout]
    lines, left = answers[layout]
    mode = f", {layout.attention} over 2 ranks" if layout.cp == 2 else ""
    z_loss = ", z-loss (coefficient 0.01, declared 0.01)" if layout.model == "top 2" else ""
    assert re.fullmatch(RIGHT_ATTENTION, lines.pop(0))
    assert lines == [
        f"probe: documents of a pack do not see each other (attention forward and backward, bitwise{mode})",
        "probe: every router has a gradient from cross-entropy, balance loss (coefficient 0.01, declared 0.01)"
        f"{z_loss}",
    ]
    assert not left


@pytest.mark.parametrize("bug", BROKEN, ids=lambda bug: bug.__name__)
def test_a_planted_bug_stops_the_run(answers, bug):
    assert isinstance(answers[bug], str), f"not caught: {answers[bug]}"
    assert answers[bug].startswith(BROKEN[bug][1])


def end_of_a_rank(experiment: Experiment) -> str:
    """How this rank ends if a kernel of rank 1 leaves its GPU unusable."""
    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.parallel.signs_of_life import is_loss_of_a_rank
    from hunyuan_pretrain.train import TrainingError, kernel_probe, setup

    def dead(device: torch.device) -> None:
        if dist.get_rank() == 1:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    with kernel_wrong_on_another_rank(), patch.object(kernel_probe, "give_back", dead):
        run = setup.prepare(experiment)
        try:
            return kernel_probe.check_kernels(run)
        except TrainingError as error:
            return str(error)
        except RuntimeError as error:
            return "another rank has ended" if is_loss_of_a_rank(error) else repr(error)


def test_a_kernel_that_leaves_its_gpu_unusable_ends_its_rank_and_thereby_the_others(
    corpus: Path, tmp_path: Path
) -> None:
    fields = Layout(dp=2).experiment(corpus, tmp_path / "run").model_dump(mode="json")
    fields["runtime"]["distributed_timeout_s"] = 600  # the others do not wait as long
    others, dead = fork_ranks(2, end_of_a_rank, Experiment.model_validate(fields), timeout_s=60)
    assert dead == (
        "the Triton kernel of swiglu has left the GPU of this rank unusable: gradient of argument 1 by "
        "0.01. Set runtime.kernels=never to train without kernels"
    )
    assert others == "another rank has ended"


# --- with Transformer Engine's own Python part and stand-ins for its kernels ------------------------------------------

needs_package = pytest.mark.usefixtures("transformer_engine")


def engine_case(corpus: Path, folder: Path, layout: Layout, **precision: Any) -> Case:
    """In bf16, with Transformer Engine's attention and sizes that FP8 supports."""
    fields = layout.experiment(corpus, folder).model_dump(mode="json")
    fields["precision"] |= {"dtype": "bf16"} | precision
    sizes = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "kv_channels": 8}
    fields["model"] |= sizes | {"num_attention_heads": 8, "num_query_groups": 4}
    return Case(Experiment.model_validate(fields), engine=True, has_attention=True)


@needs_package
def test_attention_that_misreads_its_inputs_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    """Under context parallelism, keys and values arrive gathered, and queries head by head."""
    cases = [
        (engine_case(corpus, tmp_path / f"{method}{has_bug}", Layout(cp=2, attention=method)), has_bug)
        for method in ("all_gather", "all_to_all")
        for has_bug in (False, True)
    ]
    for gathered, misread, traded, traded_as_it_is in run_ranks(2, probed, cases):
        for lines, left in (gathered, traded, traded_as_it_is):  # what comes from an exchange of heads is contiguous
            assert lines[0].startswith(
                "probe: attention by cudnn matches packed_attention, forward and backward (largest"
            )
            assert left == []
        refusal = "attention by cudnn does not match packed_attention on the same queries, keys and values: output by "
        assert misread.startswith(refusal)
        assert "do not train with this attention backend" in misread


@needs_package
def test_probes_run_with_fp8_only_parameters(corpus: Path, tmp_path: Path) -> None:
    """Outside an FP8 step, GEMMs use the values that such a weight represents, and its gradient arrives where all
    others do."""
    cases = [
        (
            engine_case(
                corpus, tmp_path / recipe, Layout(optimizer="distributed"), fp8_recipe=recipe, fp8_parameters=True
            ),
            False,
        )
        for recipe in ("delayed", "tensorwise", "blockwise")
    ]
    (found,) = run_ranks(1, probed, cases)
    for lines, left in found:
        assert len(lines) == 3
        assert left == []
