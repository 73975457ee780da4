"""What megatron-core's own GPTModel and its own checkpoints need on a CPU beyond runtime.cpu_megatron."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from hunyuan_pretrain.runtime import cpu_megatron


class _Event:
    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream whose work is always complete, as it is for every CPU operation that has returned."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Install the shim and the names that only GPTModel and its token dispatcher use. Before megatron is imported."""
    # Megatron's users have no fused accumulation without Apex: the peer is measured as they have it
    cpu_megatron.install(leave_out={"wgrad_accumulation"})
    import torch

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Stream()
    torch.cuda.stream = lambda stream: nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None
    torch.cuda.synchronize = lambda device=None: None

    exchange = torch.distributed.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = [x.tolist() if isinstance(x, torch.Tensor) else x for x in (output_split_sizes, input_split_sizes)]
        return exchange(output, input, *splits, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single
    from megatron.core.transformer.moe import moe_utils

    # core calls it only with Transformer Engine, but also imports it without
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def save_by_core(state: dict[str, object], folder: Path) -> None:
    """Save as megatron-core does by itself."""
    from megatron.core import dist_checkpointing

    with patch("torch.cuda.synchronize"):
        dist_checkpointing.save(state, str(folder))


def sequence_parallel_norm() -> type:
    """A local RMSNorm class that, unlike core's, supports sequence parallelism: its gradient is summed over the
    tensor-parallel ranks."""
    import torch

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
            super().__init__(hidden_size, eps=eps)
            self.weight.sequence_parallel = config.sequence_parallel

    return Norm
