"""Every attention backend gives what attention by its definition gives, forward and backward. On a CPU, kernels of a
GPU are stand-ins that refuse what the kernels would misread (tests/helpers/flash_attention_stub.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.config.attention import BACKENDS, AttentionChoice
from hunyuan_pretrain.model.attention_backends import BUILDERS, ByMicroBatch, CoreAttention, Heads
from hunyuan_pretrain.model.packed_attention import (
    Block,
    batched_attention,
    context_blocks,
    document_blocks,
    is_uniform,
    packed_attention,
)
from hunyuan_pretrain.parallel.context_parallel import rows_of_ranks
from hunyuan_pretrain.train.attention_check import ROUNDINGS, Compared, allowed_difference, plain_softmax
from tests.helpers import flash_attention_stub
from tests.helpers.transformer_engine_cases import LAYOUTS, laid_out

RAGGED = list(accumulate([1, 37, 2, 88, 1, 63, 52, 12], initial=0))
"""Two sequences of 128 tokens."""
UNIFORM = [0, 64, 128, 192, 256]
HEADS = [Heads(4, 2, 64), Heads(4, 1, 80), Heads(3, 3, 96), Heads(4, 2, 128)]
VARLEN = ["torch_varlen", "flash_attn_2", "flash_attn_3"]


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with flash_attention_stub.everything():
        yield


def numbers(heads: Heads, num_queries: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_queries, heads.queries), (256, heads.groups), (256, heads.groups))
    return [torch.randn(*shape, heads.width, generator=generator).to(dtype) for shape in shapes]


def assert_equal_to(
    reference: CoreAttention, backend: CoreAttention, qkv: Sequence[Tensor], blocks: Sequence[Block]
) -> None:
    compared = Compared(backend, reference)
    out_TNH = compared(qkv[0], qkv[1], qkv[2], blocks)
    assert out_TNH.is_contiguous()
    for name, difference in compared.differences.items():
        allowed = allowed_difference(ROUNDINGS[name], qkv[0].dtype, 256 + qkv[0].shape[-1])
        assert difference.item() <= allowed, name


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["per_document", *VARLEN])
def test_a_backend_for_packs_is_softmax_attention_in_each_document(name: str, heads: Heads) -> None:
    backend = BUILDERS[name](heads)  # type: ignore[index]
    for cu_seqlens in (RAGGED, UNIFORM, [0, 256]):
        assert_equal_to(plain_softmax, backend, numbers(heads, 256), document_blocks(cu_seqlens))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_batched_backend_is_softmax_attention_in_each_document(heads: Heads, dtype: torch.dtype) -> None:
    for cu_seqlens in (UNIFORM, [0, 256], list(range(0, 257, 8))):
        assert_equal_to(plain_softmax, batched_attention, numbers(heads, 256, dtype), document_blocks(cu_seqlens))


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_ranks_attend_to_all_rows(name: str, cp_size: int) -> None:
    """A rank has fewer queries than keys, and not all documents."""
    backend = BUILDERS[name](HEADS[0])  # type: ignore[index]
    for ranges in rows_of_ranks(RAGGED, 2, cp_size, 8):
        blocks = context_blocks(RAGGED, ranges)
        assert_equal_to(plain_softmax, backend, numbers(HEADS[0], 256 // cp_size), blocks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*VARLEN, "torch_batched"])
def test_any_memory_layout_is_read_correctly(name: str, layout: str) -> None:
    backend = BUILDERS[name](HEADS[1])  # type: ignore[index]
    blocks = document_blocks(UNIFORM)
    for is_q_by_head in (True, False):
        qkv = laid_out(numbers(HEADS[1], 256), layout, is_q_by_head)
        assert_equal_to(plain_softmax, backend, qkv, blocks)
    transposed = [x.mT.contiguous().mT for x in numbers(HEADS[1], 256)]
    assert_equal_to(plain_softmax, backend, transposed, blocks)


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_kernels_are_deterministic_if_the_run_is(is_deterministic: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        for name in VARLEN:
            BUILDERS[name](HEADS[0])(*numbers(HEADS[0], 256), document_blocks(RAGGED))  # type: ignore[index]
    finally:
        torch.use_deterministic_algorithms(before)
    assert flash_attention_stub.calls == [(name, is_deterministic) for name in VARLEN]


def test_a_kernel_gets_only_what_it_reads_correctly() -> None:
    """Other dtypes are refused before the kernel; what this project could pass wrongly, the stand-in would refuse."""
    blocks = document_blocks(RAGGED)
    with pytest.raises(ValueError, match=r"flash_attn_2: tensor 0 is torch.float32, but must be torch.bfloat16"):
        BUILDERS["flash_attn_2"](HEADS[0])(*numbers(HEADS[0], 256, torch.float32), blocks)
    q, k, v = numbers(HEADS[0], 256)
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)
    right = (q, k, v, cu_seqlens, cu_seqlens, 88, 88)
    flash_attention_stub.check(*right)
    wrong = {
        "q has head width": (q[..., :20].contiguous(), k[..., :20], v[..., :20]),
        "strides": (q.mT.contiguous().mT,),
        "cu_seqlens_q:": (q, k, v, cu_seqlens.long()),
        "for 256 rows": (q, k, v, cu_seqlens[:-1]),
        "max_seqlen_q is 64": (q, k, v, cu_seqlens, cu_seqlens, 64),
        "max_seqlen_q is tensor": (q, k, v, cu_seqlens, cu_seqlens, torch.tensor(88)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            flash_attention_stub.check(*arguments, *right[len(arguments) :])  # type: ignore[arg-type]


def test_an_early_flash_attn_3_works_too() -> None:
    del sys.modules["flash_attn_interface"]
    with flash_attention_stub.packages(is_early=True):
        backend = BUILDERS["flash_attn_3"](HEADS[0])
    assert_equal_to(plain_softmax, backend, numbers(HEADS[0], 256), document_blocks(RAGGED))


def test_the_lengths_of_the_documents_decide_between_two_backends() -> None:
    asked = []

    def backend(name: str) -> CoreAttention:
        def attend(*arguments: object) -> Tensor:
            asked.append(name)
            return packed_attention(*arguments)  # type: ignore[arg-type]

        return attend

    both = ByMicroBatch(AttentionChoice("per_document", "torch_batched"), backend("packed"), backend("uniform"))
    for cu_seqlens in (RAGGED, UNIFORM, [0, 256], [0, 100, 200, 256]):
        both(*numbers(HEADS[0], 256), document_blocks(cu_seqlens))
    assert asked == ["packed", "uniform", "uniform", "packed"]
    assert both.name == "per_document and torch_batched"


def test_documents_of_one_length_are_recognised() -> None:
    assert is_uniform(document_blocks(UNIFORM), 256)
    assert is_uniform(document_blocks([0, 256]), 256)
    assert not is_uniform(document_blocks(RAGGED), 256)
    assert not is_uniform(document_blocks([0, 64, 128, 192]), 256)
    for cp_size in (2, 4):
        for ranges in rows_of_ranks([0, 128, 256], 2, cp_size, 8):
            assert not is_uniform(context_blocks([0, 128, 256], ranges), 256)
    with pytest.raises(AssertionError, match="documents of one length"):
        batched_attention(*numbers(HEADS[0], 256), document_blocks(RAGGED))


def test_every_backend_of_the_list_has_a_function() -> None:
    assert list(BUILDERS) == list(BACKENDS)
    assert all(backend.name == name for name, backend in BACKENDS.items())


def test_optional_packages_are_imported_only_for_a_backend_that_needs_them() -> None:
    code = (
        "import sys, hunyuan_pretrain.train.attention_choice, hunyuan_pretrain.model.hunyuan_model; "
        "print([name for name, module in sys.modules.items() "
        "if name.startswith(('flash_attn', 'transformer_engine')) and module])"
    )
    install = "from hunyuan_pretrain.runtime import cpu_megatron; cpu_megatron.install(); "
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", install + code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
