"""Lets vLLM serve exports of format hunyuan, and Tencent's release: entry point `vllm.general_plugins` of this package.

vLLM calls `register` in each of its processes, whatever model it serves. So nothing is imported before, and the model
is named, not imported: it costs nothing where another model is served.
"""

from __future__ import annotations

ARCHITECTURE = "HunYuanForCausalLM"
"""`architectures` in config.json. vLLM itself knows no model of this name."""

MODEL = "hunyuan_pretrain.serving.vllm_model:HunYuanForCausalLM"


def register() -> None:
    """Tell vLLM the model class, and transformers the configuration class, so that no code of the export runs and
    --trust-remote-code is not needed. May be called again. Raises ImportError without vLLM."""
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise ImportError(
            "hunyuan_pretrain.serving.vllm_plugin is called by vLLM, which is not installed here "
            "(docs/guide/serving.md)"
        ) from error
    from transformers import AutoConfig

    from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
