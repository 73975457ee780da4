"""The matmuls of one rank by shape, attention included, and how long they take on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS, Grid, expert_rows
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, StageConfig
from hunyuan_pretrain.plan.hardware import Format, Hardware

TILE = (128, 256)
"""Rows and columns of the result that a streaming multiprocessor computes at a time, or the other way round: the size
with which Hopper and Blackwell reach their peak (CUTLASS's and cuBLAS's large kernels)."""
ATTENTION_WIDTHS = (64, 128, 192, 256)
"""Head widths for which there are fast attention kernels; another width costs as much as the next one."""
MEASURED = (8192, 8192)
"""Result of the matmul whose share of the peak Hardware.achieved gives."""


@dataclass(frozen=True)
class Matmul:
    """(rows, inputs) times (inputs, outputs), `groups` times."""

    part: str
    rows: int
    inputs: int
    outputs: int
    groups: int = 1
    number_format: Format = "bf16"
    width: int = 2
    """Bytes of a value of an operand that is not in FP8."""

    @property
    def flops(self) -> float:
        """A multiply-add counts as 2."""
        return 2.0 * self.groups * self.rows * self.inputs * self.outputs

    @property
    def weights(self) -> int:
        """Elements of the weight, for the forward pass."""
        return self.groups * self.inputs * self.outputs

    @property
    def input_gradient(self) -> Matmul:
        """The matmul of the backward pass that gives the gradient of the input."""
        return replace(self, inputs=self.outputs, outputs=self.inputs)

    @property
    def weight_gradient(self) -> Matmul:
        """The matmul of the backward pass that gives the gradient of the weight."""
        return replace(self, rows=self.outputs, inputs=self.rows, outputs=self.inputs)

    def seconds(self, hardware: Hardware) -> float:
        """Limited by the multiplications, or by reading the operands and writing the result once."""
        rate = hardware.matmul_flops_per_s(self.number_format)
        waste = _waste(self.rows, self.outputs, self.groups, hardware) / _waste(*MEASURED, 1, hardware)
        operand = self.width if self.number_format == "bf16" else 1
        values = self.inputs * (self.rows + self.outputs) * operand + self.rows * self.outputs * self.width
        return max(self.flops / rate * waste, self.groups * values / hardware.copy_bytes_per_s)


def _waste(rows: int, columns: int, groups: int, hardware: Hardware) -> float:
    """Time of the tiles over that of the result's elements: tiles reach beyond its edge, and the last wave of tiles
    leaves multiprocessors idle. There are flatter tiles for few rows, in steps of 16."""
    found = []
    for height, width in (TILE, TILE[::-1]):
        height, width = min(height, 16 * math.ceil(rows / 16)), min(width, 16 * math.ceil(columns / 16))
        waves = math.ceil(groups * math.ceil(rows / height) * math.ceil(columns / width) / hardware.num_sms)
        found.append(waves * hardware.num_sms * height * width / (groups * rows * columns))
    return min(found)


def matmuls_of_layer(
    experiment: Experiment, stage: StageConfig, ranks: Grid, layer: int, imbalance: float = 1.0
) -> Iterator[Matmul]:
    """Forward matmuls of a layer for one micro-batch on one rank. `imbalance`: rows of the fullest rank over the mean,
    without a capacity."""
    model, precision = experiment.model, experiment.precision
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim // ranks.tp
    key = model.num_query_groups * model.head_dim // ranks.tp * (layer % model.cla_share_factor == 0)
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp
    width = 2 if precision.dtype == "bf16" else 4
    number_format: Format = "bf16"
    if precision.is_fp8_layer(layer, model.num_layers):
        number_format = "mxfp8" if precision.fp8_recipe == "mxfp8" else "fp8"
    shared, routed = model.ffn_hidden_size // ranks.tp, model.expert_ffn_size // ranks.expert_tp
    rows = rows_of_expert(experiment, stage, ranks, imbalance)
    experts = model.num_moe_experts // ranks.ep
    yield Matmul("attention projections", tokens, hidden, query + 2 * key, 1, number_format, width)
    yield Matmul("attention projections", tokens, query, hidden, 1, number_format, width)
    yield Matmul("router", tokens // ranks.tp, hidden, model.num_moe_experts, 1, "bf16", width)
    yield Matmul("experts", tokens, hidden, 2 * shared, 1, number_format, width)
    yield Matmul("experts", tokens, shared, hidden, 1, number_format, width)
    yield Matmul("experts", rows, hidden, 2 * routed, experts, number_format, width)
    yield Matmul("experts", rows, routed, hidden, experts, number_format, width)


def rows_of_expert(experiment: Experiment, stage: StageConfig, ranks: Grid, imbalance: float) -> int:
    """Rows in one matmul of a routed expert: its capacity, or `imbalance` times the mean."""
    rows = expert_rows(experiment, stage, ranks.world_size)
    if rows is not None:
        return rows
    model = experiment.model
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp // ranks.tp
    mean = tokens * model.moe_router_topk * ranks.ep * ranks.expert_tp / model.num_moe_experts
    return max(1, round(imbalance * mean))


def matmuls_of_output_layer(model: ModelConfig, tokens: int, ranks: Grid, width: int) -> list[tuple[Matmul, int]]:
    """(matmul, how often): logits of a micro-batch of `tokens` tokens, in chunks."""
    chunk = min(LOSS_CHUNK_TOKENS["cuda"], tokens)
    logits = Matmul("output layer", chunk, model.hidden_size, model.padded_vocab_size // ranks.tp, width=width)
    rest = tokens % chunk
    return [(logits, tokens // chunk), *([(replace(logits, rows=rest), 1)] if rest else [])]


def attention_s(
    model: ModelConfig, tokens: int, document_tokens: float, ranks: Grid, hardware: Hardware
) -> tuple[float, float]:
    """Seconds of attention itself in one layer, forward and backward, for `tokens` tokens of this rank in documents of
    `document_tokens` tokens each. Only the pairs that the causal mask allows are computed."""
    heads = model.num_attention_heads / ranks.tp
    width = next((one for one in ATTENTION_WIDTHS if one >= model.head_dim), model.head_dim)
    forward = 4 * heads * width * tokens * (document_tokens + 1) / 2
    peak, achieved = hardware.peak_bf16_flops_per_s, hardware.achieved
    # the backward pass computes the scores again: five matmuls instead of two
    return forward / (peak * achieved.attention_forward), 2.5 * forward / (peak * achieved.attention_backward)
