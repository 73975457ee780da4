"""The assignment of choices within the capacity once more, in Python's integers, token by token; and cases for it.

Shapes: as in model/recycle_routing.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, transformer_config
from hunyuan_pretrain.model.recycle_routing import Assign
from hunyuan_pretrain.model.routing import DROPPED, TrainingRouting
from tests.helpers.tiny import tiny_model

WORD = 1 << 64


def mixed(key: int) -> int:
    """splitmix64's finaliser."""
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % WORD
    key = (key ^ key >> 27) * 0x94D049BB133111EB % WORD
    return key ^ key >> 31


def priority(*key: int) -> int:
    """Of (seed, step, layer, group, slot)."""
    state = 0
    for part in key:
        state = mixed((state + (part + 1) * 0x9E3779B97F4A7C15) % WORD)
    return state % (1 << 63)


def slots_of_group(chosen_gK: list[list[int]], num_experts: int, capacity: int, key: tuple[int, ...] | None) -> Any:
    """Slot of each choice [k][token], DROPPED without one. key: (seed, step, layer, group); None: no recycling."""
    used, slots, overflowing = [0] * num_experts, [], []
    for k in range(len(chosen_gK[0])):
        slots.append([DROPPED] * len(chosen_gK))
        for token, chosen_K in enumerate(chosen_gK):
            expert = chosen_K[k]
            if used[expert] < capacity:
                slots[k][token] = expert * capacity + used[expert]
                used[expert] += 1
            else:
                overflowing.append((k, token))
    if key is not None:
        free = [e * capacity + c for e in range(num_experts) for c in range(used[e], capacity)]
        free.sort(key=lambda slot: priority(*key, slot))
        for (k, token), slot in zip(overflowing, free, strict=False):
            slots[k][token] = slot
    return slots


def reference(chosen_TK: Tensor, config: HunyuanConfig, layer: int, routing: TrainingRouting) -> dict[str, Any]:
    """The fields of model.recycle_routing.Assignment that hold numbers."""
    (T, K), E, g = chosen_TK.shape, config.num_moe_experts, config.model.moe_routing_group_tokens
    n, capacity = T // g, expert_capacity(config.model)
    num_rows = n * E * capacity
    expert, row, token_of, chosen = chosen_TK.tolist(), [[num_rows] * K for _ in range(T)], [T] * num_rows, []
    for group, number in enumerate(routing.group_n.tolist()):
        chosen_gK = chosen_TK[group * g : (group + 1) * g].tolist()
        chosen.append([sum(chosen_K.count(e) for chosen_K in chosen_gK) for e in range(E)])
        key = (routing.seed, routing.step, layer, number) if config.model.recycle_routing else None
        for k, slots in enumerate(slots_of_group(chosen_gK, E, capacity, key)):
            for token, slot in enumerate(slots, start=group * g):
                if slot != DROPPED:
                    expert[token][k] = slot // capacity
                    row[token][k] = (slot // capacity * n + group) * capacity + slot % capacity
                    token_of[row[token][k]] = token
    return {"expert_TK": expert, "row_TK": row, "token_R": token_of, "chosen_nE": chosen}


# --- cases ------------------------------------------------------------------------------------------------------------


def case(seed: int, n: int, device: str = "cpu", **changes: Any) -> tuple[Tensor, HunyuanConfig, int, TrainingRouting]:
    """Arguments of an assignment: skewed choices of n groups, whose numbers are not consecutive."""
    model: ModelConfig = tiny_model(**changes)
    config = transformer_config(model, ParallelConfig(), PrecisionConfig(dtype="fp32"))
    generator = torch.Generator().manual_seed(seed)
    T, E = n * model.moe_routing_group_tokens, model.num_moe_experts
    scores_TE = torch.randn(T, E, generator=generator) + (seed % 3) * torch.arange(E)
    chosen_TK = scores_TE.topk(model.moe_router_topk, dim=-1).indices
    step, group_n = int(torch.randint(10**6, (), generator=generator)), torch.arange(n) * 7 + seed
    routing = TrainingRouting(seed * 10**9 + 3, step, group_n.to(device), n)
    return chosen_TK.to(device), config, seed * 5 + 1, routing


def assert_same(assign: Assign, wanted: Assign, arguments: tuple[Any, ...]) -> None:
    """Both functions give bitwise the same fields, of the same dtypes."""
    actual, right = assign(*arguments), wanted(*arguments)
    for name, a, b in zip(right._fields, actual, right, strict=True):
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor)
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {b.numel()} differ"
        else:
            assert a == b, name
