"""Every attention backend that this GPU has, on its real kernels: against attention by its definition and against
`packed_attention`, and its determinism. `make test-gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.attention import BACKENDS, AttentionChoice, BackendName, Work
from hunyuan_pretrain.config.schema import ParallelConfig
from hunyuan_pretrain.model.attention_backends import BUILDERS, Heads, use_attention
from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks, packed_attention
from hunyuan_pretrain.model.varlen_attention import padded, recorded_documents
from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.train.attention_check import ROUNDINGS, Compared, allowed_difference, plain_softmax
from tests.helpers.fp8_comparisons import built, inputs
from tests.helpers.transformer_engine_cases import LAYOUTS, laid_out

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BORDERS, UNIFORM = [0, 100, 128, 188, 256], [0, 64, 128, 192, 256]
HEADS = [Heads(4, 2, 64), Heads(10, 1, 80), Heads(6, 6, 96), Heads(8, 2, 128)]


@pytest.fixture(params=[True, False], ids=["deterministic", "not deterministic"], autouse=True)
def is_deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def backend_of(name: BackendName, heads: Heads) -> Any:
    """The backend; skips the test if this machine lacks it."""
    machine = probe()
    work = Work(
        capability=machine.gpus[0].capability,
        packages={
            "transformer-engine": machine.transformer_engine if machine.has_transformer_engine else None,
            "flash-attn": machine.flash_attn,
            "flash-attn-3": machine.flash_attn_3,
        },
        dtype="bf16",
        head_dim=heads.width,
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
        is_gathered=False,
        is_recorded=False,
        longest_scores=0,
    )
    if (reason := BACKENDS[name].missing(work)) is not None:
        pytest.skip(f"{name}: {reason}")
    return BUILDERS[name](heads)


def assert_equal_to(reference: Any, backend: Any, qkv: list[Any], blocks: Any, what: str = "") -> None:
    compared = Compared(backend, reference)
    compared(qkv[0], qkv[1], qkv[2], blocks)
    for name, difference in compared.differences.items():
        allowed = allowed_difference(ROUNDINGS[name], qkv[0].dtype, 256 + qkv[0].shape[-1])
        assert difference.item() <= allowed, f"{name} {what}"


def numbers(heads: Heads, num_queries: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = ((num_queries, heads.queries), (256, heads.groups), (256, heads.groups))
    return [torch.randn(*shape, heads.width, device="cuda", dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_softmax_attention_in_each_document(name: BackendName, heads: Heads) -> None:
    """In any memory layout of queries, keys and values, within the rounding that the probe before training allows."""
    backend, is_packed = backend_of(name, heads), BACKENDS[name].kind == "packed"
    for borders in (UNIFORM, [0, 256], *([BORDERS, [0, 1, 255, 256]] if is_packed else [])):
        assert_equal_to(plain_softmax, backend, numbers(heads, 256), document_blocks(borders), str(borders))
    blocks = document_blocks(BORDERS if is_packed else UNIFORM)
    qkv = numbers(heads, 256)
    for layout in LAYOUTS:
        for is_q_by_head in (True, False):
            what = f"{layout}, q head by head: {is_q_by_head}"
            assert_equal_to(packed_attention, backend, laid_out(qkv, layout, is_q_by_head), blocks, what)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("ranges", [[(0, 64), (192, 256)], [(64, 192)]], ids=str)
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.kind == "packed"])
def test_context_ranks_attend_to_all_rows(name: BackendName, ranges: list[tuple[int, int]], heads: Heads) -> None:
    blocks = context_blocks(BORDERS, ranges)
    assert_equal_to(plain_softmax, backend_of(name, heads), numbers(heads, blocks[-1].q_end), blocks)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.reads_memory])
def test_documents_without_tokens_change_nothing(name: BackendName, heads: Heads) -> None:
    """As in a recorded step: room for more documents, all of them shorter than the kernel is told."""
    backend = backend_of(name, heads)
    memory = padded(BORDERS, 20).cuda()

    def with_room(q: Any, k: Any, v: Any, blocks: Any) -> Any:
        return backend(q, k, v, recorded_documents(memory, 256, 256))

    assert_equal_to(plain_softmax, with_room, numbers(heads, 256), document_blocks(BORDERS))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_deterministic_backend_repeats_every_bit(name: BackendName, heads: Heads, is_deterministic: bool) -> None:
    """Long enough that several thread blocks add to one gradient."""
    if not is_deterministic:
        pytest.skip("runtime.deterministic=false promises no equal bits")
    backend, length = backend_of(name, heads), 2048
    qkv = [
        torch.randn(2 * length, count, heads.width, device="cuda", dtype=torch.bfloat16)
        for count in (heads.queries, heads.groups, heads.groups)
    ]
    repeated = Compared(backend, backend)
    for _ in range(3):
        repeated(qkv[0], qkv[1], qkv[2], document_blocks([0, length, 2 * length]))
    assert {what: difference.item() for what, difference in repeated.differences.items()} == dict.fromkeys(ROUNDINGS, 0)


def test_the_local_attention_in_fp32_is_a_softmax() -> None:
    qkv = laid_out(numbers(Heads(8, 2, 80), 256, torch.float32), "parts of a projection", True)
    assert_equal_to(plain_softmax, packed_attention, qkv, document_blocks(BORDERS))


@cache
def groups() -> Any:
    initialize_distributed("nccl", 60)
    return build_groups(ParallelConfig(), 60)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_host_never_waits_for_attention(name: BackendName) -> None:
    model, micro_batch = built(groups(), engine=False), inputs("cuda")
    backend_of(name, Heads(4, 2, model.config.kv_channels))
    if BACKENDS[name].kind == "uniform":
        micro_batch.cu_seqlens[:] = [0, 128, 256]
    use_attention([model], AttentionChoice(name if BACKENDS[name].kind == "packed" else "per_document", name))
    for mode in ("default", "error"):  # the first step compiles and allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = model(micro_batch)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
