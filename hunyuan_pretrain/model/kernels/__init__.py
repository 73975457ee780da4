"""The functions between the matmuls as Triton kernels.

Each kernel reads its inputs once and writes its outputs once, whatever their strides, and computes in fp32 in between.
No kernel adds with atomics, so a result does not depend on the order of threads. Triton is an optional package: nothing
here is imported before model/engines.py has chosen it. Tests run every kernel on a CPU by Triton's interpreter
(TRITON_INTERPRET=1) against the plain function; `make test-gpu` runs them compiled.
"""

from __future__ import annotations

from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.model.kernels import (
    assignment,
    cross_entropy,
    gating,
    permutation,
    rms_norm,
    rope_norm,
    router_logits,
    swiglu,
)


def kernel_functions() -> Functions:
    """The plain functions, replaced by kernels where there is one."""
    return plain_functions()._replace(
        add_rms_norm=rms_norm.add_rms_norm,
        rope_norm=rope_norm.rope_norm,
        qkv_rope_norm=rope_norm.qkv_rope_norm,
        swiglu=swiglu.swiglu,
        router_logits=router_logits.router_logits,
        permute=permutation.permute,
        combine=permutation.combine,
        assign=assignment.assign_within_capacity,
        gating=gating.gating,
        chunk_loss=cross_entropy.chunk_loss,
    )
