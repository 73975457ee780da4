"""What megatron-core's own GPTModel needs on a CPU beyond runtime.cpu_megatron, for benchmarks and comparisons against it."""

from __future__ import annotations

from hunyuan_pretrain.runtime import cpu_megatron


class _Event:
    def synchronize(self) -> None:
        pass


def install() -> None:
    """Install the shim and the names that only GPTModel and its token dispatcher use. Before megatron is imported."""
    # Megatron's users have no fused accumulation without Apex: the peer is measured as they have it
    cpu_megatron.install(leave_out={"wgrad_accumulation"})
    import torch

    torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.Stream.record_event = lambda self, event=None: _Event()
    torch.cuda.Stream.wait_event = lambda self, event: None

    exchange = torch.distributed.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = [x.tolist() if isinstance(x, torch.Tensor) else x for x in (output_split_sizes, input_split_sizes)]
        return exchange(output, input, *splits, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single
    from megatron.core.transformer.moe import moe_utils

    # core calls it with Transformer Engine only, but names it without too
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
