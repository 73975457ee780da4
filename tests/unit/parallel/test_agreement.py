"""What a rank tells the others of a failure."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from hunyuan_pretrain.parallel.agreement import reason_of

CUDA = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in the documentation\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.AcceleratorError(CUDA), "CUDA error: an illegal memory access was encountered"),
        (RuntimeError("a wrapper\nthe cause"), "the cause"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs"), os.strerror(errno.ENOSPC)),
        (RuntimeError("unexpected pos 3 vs 2"), os.strerror(errno.ENOSPC)),
        (KeyError(), "KeyError"),
    ],
    ids=["a GPU", "several layers", "a disk", "a short write", "no words"],
)
def test_the_part_of_an_error_that_a_person_needs(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
