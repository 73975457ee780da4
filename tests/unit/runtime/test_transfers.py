"""Copies to and from a device; tests/gpu/test_step_waits.py runs them on one."""

from __future__ import annotations

import pytest
import torch

from hunyuan_pretrain.runtime.transfers import ALIGNMENT, Incoming, Outgoing, Resident, packed_bytes, unpacked

TENSORS = [torch.arange(5), torch.rand(7), torch.rand(3, 4, dtype=torch.float64).t(), torch.zeros(0), torch.arange(3)]


def test_packed_tensors_come_out_as_they_went_in() -> None:
    packed = packed_bytes(TENSORS)
    for tensor, view in zip(TENSORS, unpacked(packed, TENSORS), strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
        assert view.storage_offset() * view.element_size() % ALIGNMENT == 0
        assert view.is_contiguous()


def test_resident_tensors_keep_their_addresses() -> None:
    resident = Resident(TENSORS, torch.device("cpu"))
    addresses = [tensor.data_ptr() for tensor in resident.tensors]
    for values in (TENSORS, [tensor + 1 for tensor in TENSORS]):
        resident.write(values)
        assert all(torch.equal(a, b) for a, b in zip(resident.tensors, values, strict=True))
    assert [tensor.data_ptr() for tensor in resident.tensors] == addresses
    with pytest.raises(AssertionError, match="fixed shapes"):
        resident.write([tensor[:1] for tensor in TENSORS])


def test_on_the_cpu_nothing_is_copied() -> None:
    taken = Incoming(TENSORS, torch.device("cpu")).take()
    assert all(a is b for a, b in zip(taken, TENSORS, strict=True))
    x = torch.rand(3, requires_grad=True)
    assert Outgoing(x).read().data_ptr() == x.data_ptr()
