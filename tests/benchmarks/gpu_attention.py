"""The part `attention` of tests/benchmarks/gpu_step.py: every attention backend that the GPU has, forward and backward,
at several head widths.

The same number of tokens as one document, as two sequences of one document each, and as a pack of eight documents; with
and without deterministic algorithms. Each result is first compared with `packed_attention`; a backend that is wrong,
fails, or is absent gets the reason instead of a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

WIDTHS = (64, 80, 96, 128)
HEADS = (80, 8)
"""Query and key/value heads, as in Hunyuan-Large."""
TOKENS = 8192
DRY_HEADS, DRY_TOKENS = (4, 2), 128


def cases(tokens: int) -> dict[str, list[int]]:
    """cu_seqlens of `tokens` tokens; the last three have sequences of half of them."""
    half = tokens // 2
    within = (0, half // 8, 3 * half // 8, half // 2)
    return {
        "one document": [0, tokens],
        "two sequences": [0, half, tokens],
        "pack of eight": [*(start + offset for start in (0, half) for offset in within), tokens],
    }


def names() -> list[str]:
    """One for each head width and backend."""
    from hunyuan_pretrain.config.attention import BACKENDS

    return [f"{backend}, head width {width}" for width in WIDTHS for backend in BACKENDS]


def measured(name: str, is_dry: bool) -> dict[str, Any]:
    """{"ms": {case: milliseconds}, "tflops": {case: ...}, "out": {case: reason}}. TFLOP/s count 14 operations for each
    query, key that it sees, head and channel: two products forward, five backward."""
    import torch

    from hunyuan_pretrain.config.attention import BACKENDS
    from hunyuan_pretrain.model.attention_backends import Heads
    from hunyuan_pretrain.model.packed_attention import document_blocks, is_uniform
    from hunyuan_pretrain.runtime.seeding import use_deterministic_algorithms
    from hunyuan_pretrain.train.attention_choice import Case, trial
    from tests.benchmarks.gpu_contenders import device

    backend = next(one for one in BACKENDS.values() if name.startswith(f"{one.name}, "))
    width = int(name.rpartition(" ")[2])
    heads, tokens = Heads(*(DRY_HEADS if is_dry else HEADS), width), DRY_TOKENS if is_dry else TOKENS
    result: dict[str, Any] = {"ms": {}, "tflops": {}, "out": {}}
    for is_deterministic in (False, True):
        use_deterministic_algorithms(is_deterministic)
        for what, cu_seqlens in cases(tokens).items():
            blocks = document_blocks(cu_seqlens)
            if backend.kind == "uniform" and not is_uniform(blocks, tokens):
                continue
            key = what + ", deterministic" * is_deterministic
            found = trial(backend.name, Case(blocks, tokens, heads, torch.bfloat16, device(), tokens))
            if math.isfinite(found.milliseconds):
                scores = heads.queries * sum((end - start) ** 2 for start, end in pairwise(cu_seqlens)) / 2
                result["ms"][key] = found.milliseconds
                result["tflops"][key] = 14 * scores * width / found.milliseconds / 1e9
            else:
                result["out"][key] = found.reason
    use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    return result


def lines(wanted: list[str], is_dry: bool) -> Iterator[dict[str, Any]]:
    """What gpu_step.py prints for each of `wanted`."""
    from contextlib import nullcontext

    from tests.helpers import flash_attention_stub

    with flash_attention_stub.everything() if is_dry else nullcontext():
        for name in wanted:
            yield {"started": name}
            yield {"finished": name, "result": measured(name, is_dry)}
