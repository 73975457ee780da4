"""Pretraining of Hunyuan-Large style mixture-of-experts models on megatron-core.

This package imports nothing else; docs/reference/ lists the modules to import from.
"""

__all__ = ["__version__"]
__version__ = "0.1.0"
