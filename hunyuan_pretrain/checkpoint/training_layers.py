"""The training model as a source of layers: megatron's classes on one rank, weights read from anywhere by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

# isort: split
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.checkpoint.layerwise import Visit
from hunyuan_pretrain.checkpoint.stored_weights import rows_of, shape_of
from hunyuan_pretrain.checkpoint.streamed import stream
from hunyuan_pretrain.checkpoint.weight_map import refuse_other_parameters
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import build_model
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.parallel.groups import build_groups, destroy_groups, initialize_distributed

__all__ = ["TrainingLayers", "one_rank"]


@contextmanager
def one_rank(timeout_s: int = 600) -> Iterator[ProcessGroupCollection]:
    """Process groups of a world of one, which megatron's classes ask for."""
    initialize_distributed("gloo", timeout_s)
    try:
        yield build_groups(ParallelConfig(), timeout_s)
    finally:
        destroy_groups()


class TrainingLayers:
    """The model of which one layer is in memory at a time, on the CPU, in the dtype of an export."""

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, Tensor],
        groups: ProcessGroupCollection,
        *,
        rope_alpha: float,
        dtype: torch.dtype,
    ) -> None:
        """weights: whole parameters by megatron name, read when a layer needs them; they are rounded to `dtype`, except
        the router's. groups: of one rank. Raises CheckpointError if names or shapes are not those of the model."""
        refuse_other_parameters(model, {name: shape_of(weights, name) for name in weights})
        precision = PrecisionConfig(dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        config = transformer_config(model, ParallelConfig(), precision, device="cpu")
        with torch.device("meta"):
            (whole,) = build_model(config, groups, seed=None)

        def dtype_of(name: str) -> torch.dtype:
            return torch.float32 if name.endswith("router.weight") else dtype

        def read(name: str) -> Tensor:
            value = torch.empty(shapes[name], dtype=dtype_of(name))
            step = 1 if value.dim() == 3 else len(value)  # experts one by one, for the memory
            for start in range(0, len(value), step):
                value[start : start + step] = rows_of(weights, name, start, start + step)
            return value

        shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
        outputs = [] if model.share_embeddings_and_output_weights else [whole.output_layer]
        norm: Any = whole.decoder.final_layernorm
        stream(whole, dtype_of, read, [whole.embedding.word_embeddings, *whole.decoder.layers, norm, *outputs])
        self._model, self._rope_alpha = whole.eval(), rope_alpha

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(list(self._model.decoder.layers))

    @torch.no_grad()
    def walk(self, texts: Sequence[Tensor], visit: Visit) -> Tensor:
        """As LayerSource.walk. The texts are the documents of one packed sequence."""
        tokens_T = torch.cat(list(texts))
        positions_T = torch.cat([torch.arange(len(text)) for text in texts])
        starts = [0, *accumulate(len(text) for text in texts)]
        kv: list[Any] = [None]  # what the group's owner computed when it was run again

        def show(layer: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            def again(x_TD: Tensor) -> Tensor:
                result_TD, kv[0], _ = layer.forward(x_TD, kv[0], *inputs[2:])
                return result_TD

            visit(layer.layer, inputs[0], output[0], again)

        hooks = [layer.register_forward_hook(show, prepend=True) for layer in self._model.decoder.layers]
        try:
            logits_TV, _ = self._model(ModelInputs(tokens_T, positions_T, starts, self._rope_alpha))
        finally:
            for hook in hooks:
                hook.remove()
        return logits_TV
