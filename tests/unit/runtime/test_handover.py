"""A tensor handed to code that reads a pointer and a shape is laid out as its shape says, or is refused by name."""

from __future__ import annotations

import pytest
import torch

from hunyuan_pretrain.runtime.handover import handed_over, to_device


def test_tensors_that_fit_are_handed_over_as_is_and_the_rest_are_copied() -> None:
    rows, columns = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2).t()
    taken = handed_over("a kernel", rows, columns)
    assert taken[0] is rows
    assert taken[1].is_contiguous()
    assert torch.equal(taken[1], columns)
    later = rows[1:]
    assert handed_over("a kernel", later)[0] is later
    assert handed_over("a kernel", later, starts_memory=True)[0].storage_offset() == 0


def test_a_reader_of_strides_accepts_everything_but_a_strided_last_dim() -> None:
    by_head = torch.zeros(2, 3, 4).transpose(0, 1)
    assert handed_over("a kernel", by_head, knows_strides=True)[0] is by_head
    assert handed_over("a kernel", by_head.mT, knows_strides=True)[0].is_contiguous()


def test_a_reader_that_compares_strides_gets_the_canonical_ones() -> None:
    """A contiguous tensor may have any stride in a dim of size 1, as the keys of a single head that were written head
    by head do."""
    one_head = torch.zeros(1, 3, 4).transpose(0, 1)
    assert one_head.is_contiguous()
    (taken,) = handed_over("a kernel", one_head, starts_memory=True)
    assert (one_head.stride(), taken.stride()) == ((4, 12, 1), (4, 4, 1))
    assert taken.data_ptr() == one_head.data_ptr()


def test_gradients_pass_through_a_copy() -> None:
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    handed_over("a kernel", x.t())[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_a_tensor_that_does_not_fit_is_refused_by_name() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"NCCL: tensor 0 is written in place, but is not contiguous: shape \(3, 2\), strides \(1, 3\)"
    ):
        handed_over("NCCL", x.t(), is_written=True)
    with pytest.raises(ValueError, match=r"NCCL: tensor 1 is torch\.bfloat16, but must be torch\.float32"):
        handed_over("NCCL", x, x.bfloat16())
    with pytest.raises(ValueError, match="NCCL: tensor 1 is on meta, the first one on cpu"):
        handed_over("NCCL", x, x.to("meta"))


def test_a_tensor_for_the_cpu_stays_where_it_is() -> None:
    x = torch.zeros(2)
    assert to_device(x, "cpu") is x
