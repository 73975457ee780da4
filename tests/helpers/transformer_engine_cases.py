"""Jobs for the tests of Transformer Engine's spec. They run in their own processes, where each job first installs the
stand-in."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tests.helpers import transformer_engine_stub

MARKS = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "is_gated": False,
    "is_routed_expert": False,
    "allreduce": True,
    "sequence_parallel": False,
    "shared": False,
    "shared_embedding": False,
}
"""Attributes of a parameter that the optimizer, core's gradient buffers, checkpoints and the weight map read, with
their defaults."""


@dataclass(frozen=True)
class Case:
    """A training run under one spec."""

    experiment: Any
    engine: bool
    is_fused: bool = True
    """Weight gradients are accumulated into main_grad inside the GEMM."""
    has_attention: bool = False
    """Attention is Transformer Engine's."""
    noise: int | None = None
    """The seed of rounding noise, see diagnostics.rounding."""
    choices: Any = None
    """Tokens are routed as in another run, by step; or as in the case of this number."""
    bug: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Build:
    """A model on one rank of a simulated world."""

    model: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    ranks: tuple[int, ...] = (0,)
    precision: dict[str, Any] = field(default_factory=dict)
    has_kernels: bool = False
    """Under Transformer Engine's spec."""


def traces(cases: Sequence[Case], steps: int) -> list[Any]:
    """On every rank: the traces of each case, one after the other."""
    transformer_engine_stub.install()
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    found = []
    for case in cases:
        gc.collect()
        choices = [step.choices for step in found[case.choices]] if isinstance(case.choices, int) else case.choices
        with chosen(case), case.bug():
            found.append(trace_layout(case.experiment, steps, case.noise, choices))
    return found


@contextmanager
def chosen(case: Case) -> Iterator[None]:
    """Inside the context, `setup.prepare` uses the spec of the case."""
    from unittest.mock import patch

    from hunyuan_pretrain.train import chunks, setup

    with ExitStack() as stack:
        stack.enter_context(patch.object(chunks, "uses_transformer_engine", lambda *_: case.engine))
        stack.enter_context(patch.object(setup, "obstacles", lambda *_: []))
        stack.enter_context(patch.object(chunks, "fuses_wgrad_accumulation", lambda *_: case.is_fused))
        if case.has_attention:
            stack.enter_context(patch.object(setup, "settle", settle_on_cudnn))
        yield


def settle_on_cudnn(experiment: Any, groups: Any, chunks: Any, loader: Any, device: Any, start: Any) -> Any:
    """In place of the choice on a GPU."""
    from hunyuan_pretrain.config.attention import AttentionChoice
    from hunyuan_pretrain.model.attention_backends import use_attention

    use_attention(chunks, AttentionChoice("cudnn", "cudnn"))
    return start


def kept(cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Bytes that the forward pass of one micro-batch leaves on the device and on the host, in each case."""
    transformer_engine_stub.install()
    import torch

    from hunyuan_pretrain.model.engines import training_step
    from hunyuan_pretrain.model.routing import TrainingRouting
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.feed import model_inputs, send
    from tests.helpers.kept_memory import KeptMemory

    found = []
    for case in cases:
        gc.collect()
        with chosen(case):
            run = setup.prepare(case.experiment)
        for chunk in run.chunks:
            chunk.offload.smallest_bytes = 1
        inputs = model_inputs(
            send(run, run.loader.micro_batches(0)[0]),
            rope_alpha=1.0,
            loss_tokens=torch.ones(()),
            route=lambda group_n, _: TrainingRouting(1, 0, group_n, len(group_n)),
        )
        memory = KeptMemory()
        with training_step(run.chunks, run.groups):
            for first in (True, False):  # the first micro-batch of a step also makes FP8 copies of the weights
                with nullcontext() if first else memory.watching():
                    loss, _ = run.wrapped[0](inputs)
                if not first:
                    gc.collect()
                    found.append((memory.bytes(), memory.bytes(on_host=True)))
                loss.backward()
                del loss
        setup.leave(run)
    return found


def probed(cases: Sequence[tuple[Case, bool]]) -> list[Any]:
    """What the probes report before the run of each case, and the names of weights that have a gradient afterwards; or
    the refusal. With the bug, attention receives the model's tensors as they are."""
    transformer_engine_stub.install()
    from unittest.mock import patch

    from hunyuan_pretrain.model.engine import attention
    from hunyuan_pretrain.train import TrainingError, setup
    from hunyuan_pretrain.train.probes import probe

    found: list[Any] = []
    for case, has_bug in cases:
        gc.collect()
        with ExitStack() as stack:
            stack.enter_context(chosen(case))
            if has_bug:
                stack.enter_context(patch.object(attention, "handed_over", lambda reader, *tensors, **_: tensors))
            run = setup.prepare(case.experiment)
            try:
                lines = probe(run)
                left = [
                    name for model in run.chunks for name, weight in model.named_parameters() if weight.main_grad.any()
                ]
                found.append((lines, left))
            except TrainingError as error:
                found.append(str(error))
            finally:
                setup.leave(run)
    return found


def gradients(cases: Sequence[tuple[bool, str]]) -> list[dict[str, Any]]:
    """Loss and gradients of one micro-batch of two layers in fp32, with each parallel.recompute: under Transformer
    Engine's spec with Triton kernels, or the local one without."""
    transformer_engine_stub.install()
    from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from tests.helpers.tiny import packed_inputs, tiny_model, world_of_one

    model, found = tiny_model(num_layers=2), []
    for use_engine, recompute in cases:
        config = transformer_config(
            model,
            ParallelConfig(recompute=recompute),  # type: ignore[arg-type]
            PrecisionConfig(dtype="fp32"),
            use_transformer_engine=use_engine,
            use_kernels=use_engine,
        )
        (chunk,) = build_model(config, world_of_one(), 1)
        loss, _ = chunk(packed_inputs(model, (20, 12)))
        loss.backward()
        named = {name: parameter.grad for name, parameter in chunk.named_parameters()} | {"loss": loss.detach()}
        found.append({name: gradient.numpy() for name, gradient in named.items()})
    return found


# --- what is built ----------------------------------------------------------------------------------------------------


def differences_of_builds(builds: Sequence[Build]) -> list[str]:
    """Differences between the parameters of both specs, on the ranks of each build."""
    transformer_engine_stub.install()
    found = []
    for build in builds:
        for rank in build.ranks:
            local, engine = (_describe(build, rank, use_engine) for use_engine in (False, True))
            if local != engine:
                differing = [name for name in local.keys() | engine.keys() if local.get(name) != engine.get(name)]
                found.append(
                    f"{build}, rank {rank}: {differing}, e.g. {local.get(differing[0])} and {engine.get(differing[0])}"
                )
    return found


def _describe(build: Build, rank: int, use_engine: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with chunks_on_meta(build, rank, {"dtype": "bf16"} | build.precision, use_engine) as chunks:
        for number, chunk in enumerate(chunks):
            placements, sharded = chunk.placements(), chunk.sharded_state_dict()
            if use_engine:  # core's own linears have an empty state each
                assert set(chunk.state_dict()) == set(placements), set(chunk.state_dict()) ^ set(placements)
                chunk.load_state_dict(chunk.state_dict())  # raises on a mismatch
            for name, parameter in chunk.named_parameters():
                marks = {mark: getattr(parameter, mark, default) for mark, default in MARKS.items()}
                facts = (
                    tuple(parameter.shape),
                    parameter.dtype,
                    parameter.requires_grad,
                    marks,
                    placements[name],
                    sharded[name].key,
                )
                found[f"{number}.{name}"] = facts
            found[f"{number} order"] = list(placements)
    return found


def norms_of_builds(builds: Sequence[Build]) -> list[list[str]]:
    """What normalises the input of each layer's attention, under Transformer Engine's spec: "fused", or the separate
    norm's package; and "kept" if the projection is told to keep that norm's output as given."""
    transformer_engine_stub.install()
    found = []
    for build in builds:
        with chunks_on_meta(build, 0, {"dtype": "bf16"} | build.precision, use_engine=True) as (chunk,):
            found.append([_input_norm(layer) for layer in chunk.decoder.layers])
    return found


def _input_norm(layer: Any) -> str:
    norm, attention = layer.input_layernorm, layer.self_attention
    linear = attention.linear_qkv if attention.is_owner else attention.linear_q
    is_fused = getattr(norm, "is_fused", False)
    assert is_fused == hasattr(linear, "layer_norm_weight")
    return "fused" if is_fused else type(norm).__module__ + ", kept" * getattr(linear, "save_original_input", False)


@contextmanager
def chunks_on_meta(build: Build, rank: int, precision: dict[str, Any], use_engine: bool) -> Iterator[list[Any]]:
    """The model chunks of this rank of the simulated world, on the meta device."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups, destroy_groups
    from tests.helpers.tiny import tiny_model

    parallel = ParallelConfig(**build.parallel)
    dist.init_process_group("fake", rank=rank, world_size=build.world_size, store=FakeStore())
    try:
        groups = build_groups(parallel, 60)
        config = transformer_config(
            tiny_model(**build.model),
            parallel,
            PrecisionConfig(**precision),
            fuse_wgrad_accumulation=True,
            use_transformer_engine=use_engine,
            use_kernels=use_engine and build.has_kernels,
        )
        with torch.device("meta"):
            chunks = build_model(config, groups, None)
        yield chunks
    finally:
        destroy_groups()


# --- FP8 --------------------------------------------------------------------------------------------------------------


@dataclass
class Fp8Run:
    """What one rank observed in an FP8 run."""

    losses: list[float]
    calls: list[Counter[Any]]
    """By step: calls of the stand-ins, with their counts."""
    reductions: list[list[int]]
    """By step: sizes of the groups over which amaxes were reduced."""
    in_fp8: dict[str, bool]
    """By linear layer: whether its last forward pass in training was in FP8."""
    state: dict[str, Any]
    """Scales of the delayed recipe at the end."""
    padded: int
    """How many times rows of experts were padded."""


def fp8_runs(experiments: Sequence[Any], steps: int, capability: tuple[int, int] = (9, 0)) -> list[Fp8Run]:
    """On every rank: each experiment's steps in `training_step`."""
    transformer_engine_stub.install(capability)
    found = []
    for experiment in experiments:
        gc.collect()
        with chosen(Case(experiment, engine=True)):
            found.append(_fp8_run(experiment, steps))
    return found


def recorded_fp8_runs(experiment: Any, steps: int) -> list[tuple[list[float], dict[str, Any]]]:
    """Losses and scales of the same steps, computed and with replays."""
    transformer_engine_stub.install((9, 0))
    from hunyuan_pretrain.model.engines import scaling_state
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.recorded_step import RecordedSteps
    from hunyuan_pretrain.train.step import train_step
    from tests.helpers.replay import Rerun

    found = []
    for number, recorded in enumerate((None, RecordedSteps(Rerun))):
        with chosen(Case(experiment, engine=True, has_attention=True)):
            run = setup.prepare(experiment.model_copy(update={"run_dir": f"{experiment.run_dir}{number}"}))
            run.recorded = recorded
            losses = [train_step(run, run.schedule.stage(step), step).loss for step in range(steps)]
            scales = {name: tensor.tolist() for name, tensor in scaling_state(run.chunks).items()}
            setup.leave(run)
        found.append((losses, scales))
    return found


def _fp8_run(experiment: Any, steps: int) -> Fp8Run:
    from unittest.mock import patch

    import torch
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from hunyuan_pretrain.model import experts
    from hunyuan_pretrain.model.engine.fp8 import Fp8Module
    from hunyuan_pretrain.model.engines import kept_scales, load_scaling_state, scaling_state, training_step
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import train_step

    run = setup.prepare(experiment)
    reduce, pad = FP8GlobalStateManager.reduce_tensor_across_group_op_max, experts.row_padding
    sizes: list[int] = []
    result = Fp8Run([], [], [], {}, {}, 0)

    def reduce_and_tell(tensor: torch.Tensor, group: Any) -> None:
        sizes.append(group.size())
        reduce(tensor, group)

    def pad_and_count(*args: Any) -> Any:
        result.padded += 1
        return pad(*args)

    products = {
        f"{number}.{name}": m
        for number, chunk in enumerate(run.chunks)
        for name, m in chunk.named_modules()
        if isinstance(m, Fp8Module)
    }
    with (
        patch.object(FP8GlobalStateManager, "reduce_tensor_across_group_op_max", staticmethod(reduce_and_tell)),
        patch.object(experts, "row_padding", pad_and_count),
    ):
        for step in range(steps):
            transformer_engine_stub.calls.clear()
            sizes.clear()
            with training_step(run.wrapped, run.groups):
                step_result = train_step(run, run.schedule.stage(step), step)
            result.losses.append(step_result.loss)
            result.calls.append(Counter(transformer_engine_stub.calls))
            result.reductions.append(list(sizes))
        result.in_fp8 = {name: product.fp8 for name, product in products.items()}
    for chunk in run.chunks:
        state = scaling_state([chunk])
        result.state |= {name: tensor.numpy().copy() for name, tensor in state.items()}
        load_scaling_state([chunk], {name: tensor * 3 for name, tensor in state.items()})
        again = scaling_state([chunk])
        assert all(torch.equal(again[name], tensor * 3) for name, tensor in state.items())
        put_back = kept_scales([chunk])
        load_scaling_state([chunk], {name: tensor * torch.inf for name, tensor in state.items()})
        put_back()
        kept = scaling_state([chunk])
        assert all(torch.equal(kept[name], again[name]) for name in again)
    assert not FP8GlobalStateManager.is_fp8_enabled()
    setup.leave(run)
    return result


# --- recipes, attention, checkpoints ----------------------------------------------------------------------------------


def recipe_fields(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fields of the recipe for each of these number formats, and its class."""
    transformer_engine_stub.install((10, 0))
    from dataclasses import asdict

    import hunyuan_pretrain.model  # noqa: F401  makes megatron importable
    from hunyuan_pretrain.config.schema import PrecisionConfig
    from hunyuan_pretrain.model.engine.fp8 import te_recipe

    found = []
    for fields in settings:
        chosen = PrecisionConfig(**fields).recipe
        assert chosen is not None
        recipe = te_recipe(chosen)
        found.append(asdict(recipe) | {"fp8_format": recipe.fp8_format.name, "class": type(recipe).__name__})
    return found


LAYOUTS = (
    "contiguous",
    "keys head by head",
    "head by head",
    "halves of one tensor",
    "parts of a projection",
    "put together",
    "rows of a longer one",
)
"""Memory layouts in which keys and values reach attention: copied; the keys, or both, as norm.rope_norm writes them on
a CPU; as parallel.context_parallel leaves them; as the projection does; after torch.cat; as a narrow."""


def laid_out(qkv: Sequence[Any], layout: str, is_q_by_head: bool) -> list[Any]:
    """The same values in another memory layout."""
    import torch

    def by_head(x: Any) -> Any:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    q, k, v = (x.clone() for x in qkv)
    q = by_head(q) if is_q_by_head else q
    if "head by head" in layout:
        return [q, by_head(k), v if layout.startswith("keys") else by_head(v)]
    if layout == "halves of one tensor":
        return [q, *torch.cat((k, v), -1).chunk(2, -1)]
    if layout == "parts of a projection":
        return [q, k, torch.stack((k, v, k), 2)[:, :, 1]]
    if layout == "put together":
        return [q, *(torch.cat([x[:1], x[1:]]) for x in (k, v))]
    if layout == "rows of a longer one":
        return [q, *(torch.cat([x[:3], x])[3:] for x in (k, v))]
    return [q, k, v]


def attention_differences(
    cu_seqlens: Sequence[int], works: Sequence[Any], heads: Sequence[tuple[int, int, int]]
) -> list[Any]:
    """For each (query heads, key/value heads, head dim), each row range of a rank and each layout: the case, the mask,
    and the largest difference of output and gradients from `packed_attention`, relative to the largest entry; or the
    error. Row range None: all rows; "batch": three sequences of one length, by the kernel for them."""
    transformer_engine_stub.install()
    import torch

    from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks, packed_attention

    generator, found = torch.Generator().manual_seed(1), []
    for num_heads, num_groups, head_dim in heads:
        for ranges in works:
            attention = _attention(num_heads, num_groups, head_dim, is_batch=ranges == "batch")
            if ranges is None or ranges == "batch":
                third = cu_seqlens[-1] // 3
                blocks = document_blocks(cu_seqlens if ranges is None else [0, third, 2 * third, 3 * third])
            else:
                blocks = context_blocks(cu_seqlens, ranges)
            T, S = blocks[-1].q_end, cu_seqlens[-1]
            qkv = [
                torch.randn(*shape, head_dim, generator=generator).bfloat16()
                for shape in ((T, num_heads), *[(S, num_groups)] * 2)
            ]
            grad = torch.randn(qkv[0].shape, generator=generator).bfloat16()
            expected = _with_gradients(packed_attention, qkv, blocks, grad)
            for layout in LAYOUTS:
                for is_q_by_head in (True, False):
                    try:
                        mine = _with_gradients(attention, laid_out(qkv, layout, is_q_by_head), blocks, grad)
                        worst: Any = max(
                            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, expected, strict=True)
                        )
                    except RuntimeError as error:
                        worst = str(error)
                    case = (
                        f"{num_heads}/{num_groups} heads of {head_dim}, {T} of {S} rows, "
                        f"{layout}{', q head by head' * is_q_by_head}"
                    )
                    found.append((case, str(transformer_engine_stub.calls[-1][1]), worst))
    return found


def attention_at_the_bound() -> tuple[tuple[int, ...], list[bool], list[tuple[int, int]]]:
    """With deterministic algorithms and 4 heads: the version; whether Transformer Engine refuses a document of 2^14 - 1
    tokens, and one of 2^14, judged by its length alone; and for this project's call, below the bound and at it, how
    often Transformer Engine computed and how many warnings there were."""
    transformer_engine_stub.install()
    import warnings
    from unittest.mock import patch

    import torch

    from hunyuan_pretrain.model.engine import attention as engine_attention
    from hunyuan_pretrain.model.packed_attention import document_blocks

    torch.use_deterministic_algorithms(True)
    attention = _attention(4, 2, 8)
    q, k, v = (torch.randn(96, heads, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    cu_seqlens, refused, computed = torch.tensor([0, 96], dtype=torch.int32), [], []
    for longest in ((1 << 14) - 1, 1 << 14):
        try:
            with engine_attention._only_cudnn():
                attention.kernel(
                    q, k, v, None, "thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
                )
            refused.append(False)
        except ValueError as error:
            refused.append(str(error).startswith("No dot product attention backend"))
    for bound in (4 * 96 * 96 + 1, 4 * 96 * 96):
        transformer_engine_stub.calls.clear()
        with (
            patch.object(engine_attention, "DETERMINISTIC_SCORES", bound),
            warnings.catch_warnings(record=True) as heard,
        ):
            attention(q, k, v, document_blocks([0, 96])).sum().backward()
        told = [warning for warning in heard if "no deterministic attention" in str(warning.message)]
        computed.append((len(transformer_engine_stub.calls), len(told)))
    return transformer_engine_stub.TE_VERSION, refused, computed


def _attention(num_heads: int, num_groups: int, head_dim: int, is_batch: bool = False) -> Any:
    import hunyuan_pretrain.model  # noqa: F401  makes megatron importable
    from hunyuan_pretrain.model.engine.attention import BatchedAttention, PackedAttention

    return (BatchedAttention if is_batch else PackedAttention)(num_heads, num_groups, head_dim)


def _with_gradients(attend: Any, qkv: Sequence[Any], blocks: Sequence[Any], grad: Any) -> list[Any]:
    import torch

    leaves = [x.detach().requires_grad_() for x in qkv]
    output = attend(*leaves, blocks)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def checkpoints_under_both_specs(experiment: Any, folder: Any) -> dict[bool, list[str]]:
    """Differences after a checkpoint of a run under one spec (the key: True for Transformer Engine's) is loaded under
    the other spec and saved again: names of weights and moments, and of files of the exports of both checkpoints. Equal
    ones are not named."""
    transformer_engine_stub.install()
    import shutil
    from pathlib import Path

    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.checkpoint.export_run import export_run
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.loop import train

    found: dict[bool, list[str]] = {}
    for first in (False, True):
        mine = experiment.model_copy(update={"run_dir": str(folder / f"run_{first}")})
        with chosen(Case(mine, first)):
            train(mine)
        states = []
        for second in (first, not first):
            with chosen(Case(mine, second)):
                run = setup.prepare(mine)
                states.append(_state(run))
                if second != first:
                    other = folder / f"again_{first}"
                    save_load.save(other, run.first_step, run.chunks, run.optimizer, None)
                setup.leave(run)
        shutil.copy(Path(mine.run_dir, "resolved.yaml"), other)
        shutil.copytree(Path(mine.run_dir, "tokenizer"), other / "tokenizer")
        exports = [folder / f"export_{first}_{name}" for name in ("first", "again")]
        for source, target in zip((Path(mine.run_dir), other), exports, strict=True):
            export_run(source, target)
        names = {path.name for export in exports for path in export.glob("*.safetensors")}
        assert names
        assert states[0]
        found[first] = [
            name for name in states[0].keys() | states[1].keys() if not _equal(*(state.get(name) for state in states))
        ]
        found[first] += [name for name in names if len({(export / name).read_bytes() for export in exports}) > 1]
    return found


def _state(run: Any) -> dict[str, Any]:
    from hunyuan_pretrain.checkpoint.optimizer_state import full_moments

    weights = {name: p.detach().clone() for chunk in run.chunks for name, p in chunk.named_parameters()}
    moments = {
        f"{kind}.{name}": t
        for name, tensors, _ in full_moments(run.chunks, run.optimizer)
        for kind, t in tensors.items()
    }
    return weights | moments


def _equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and bool((a == b).all())
