"""Chooses the engine that computes linear layers, experts and norms: the only place that does.

Either Transformer Engine's kernels (model/engine/), or the layers that run everywhere (model/local_layers.py), with FP8
emulated (model/fp8/). With either, the functions between the matmuls are torch's (model/functions.py) or Triton kernels
(model/kernels/). Attention has backends of its own (model/attention_backends.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.model.fp8 import session
from hunyuan_pretrain.model.fp8.emulated import emulated_fp8_spec
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.local_layers import local_spec
from hunyuan_pretrain.model.norm import RMSNorm
from hunyuan_pretrain.model.spec import Spec

Models = Sequence[torch.nn.Module]
"""The model chunks of this rank."""


class Fp8Session(Protocol):
    """What an engine provides for training in FP8: a module with these functions."""

    def training_step(self, models: Models, groups: ProcessGroupCollection) -> AbstractContextManager[None]: ...

    def scaling_state(self, models: Models) -> dict[str, Tensor]: ...

    def load_scaling_state(self, models: Models, state: dict[str, Tensor]) -> None: ...

    def scaling_tensors(self, models: Models) -> dict[str, Tensor]: ...


def choose_spec(config: HunyuanConfig, layer: int) -> Spec:
    """The spec of a layer, counted from 0 over the whole model."""
    spec = _layers(config, layer)
    if not config.uses_kernels:
        return spec
    from hunyuan_pretrain.model.kernels import kernel_functions  # optional package

    functions = kernel_functions()
    # also in place of Transformer Engine's separate norms, which neither add the branch nor the residual's gradient
    norm = partial(RMSNorm, function=functions.add_rms_norm)
    is_fused = getattr(spec.input_norm, "is_fused", False)
    return replace(spec, functions=functions, norm=norm, input_norm=spec.input_norm if is_fused else norm)


def _layers(config: HunyuanConfig, layer: int) -> Spec:
    if config.uses_transformer_engine:
        # imported only when used: it is an optional package, and loading it takes seconds
        from hunyuan_pretrain.model.engine.layers import transformer_engine_spec

        return transformer_engine_spec(config, layer)
    return emulated_fp8_spec() if config.precision.is_fp8_layer(layer, config.num_layers) else local_spec()


def _session(models: Models) -> Fp8Session:
    config: Any = models[0].config
    if config.uses_transformer_engine:
        from hunyuan_pretrain.model.engine import fp8

        return fp8
    return session


def training_step(models: Models, groups: ProcessGroupCollection) -> AbstractContextManager[None]:
    """A context for one optimizer step. Inside, layers with a recipe compute in FP8; outside, as in validation, in the
    dtype of the run. Delayed scales are updated at the end.

    It covers all micro-batches of the step, forward and backward. Communicates at the end, with the delayed recipe: the
    largest values, over the tensor-, context- and data-parallel ranks; for experts, over the ranks that hold the same
    ones.
    """
    return _session(models).training_step(models, groups)


def scaling_state(models: Models) -> dict[str, Tensor]:
    """State of the delayed recipe: "layer.operand.history" (H, e) and "layer.operand.scale" (e,), fp32, for the
    operands x, w and dy, H steps and e experts of this rank (1 for a linear layer). Do not modify it. {} under other
    recipes."""
    return _session(models).scaling_state(models)


def load_scaling_state(models: Models, state: dict[str, Tensor]) -> None:
    """Write what `scaling_state` of the same layers returned. Raises KeyError if an entry is missing."""
    _session(models).load_scaling_state(models, state)


def kept_scales(models: Models) -> Callable[[], None]:
    """Keep the scales as they are now. Returns a function that puts them back: a step that is left out must not leave
    its largest values, which may be infinite, in the histories of the delayed recipe."""
    tensors = _session(models).scaling_tensors(models)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}

    def put_back() -> None:
        for name, tensor in kept.items():
            tensors[name].copy_(tensor)

    return put_back
