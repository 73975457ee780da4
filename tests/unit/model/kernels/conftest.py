"""Where the tests of this folder run the kernels: on a GPU if there is one, else on CPU tensors, interpreted."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
