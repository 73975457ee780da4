"""Messages of torch and megatron-core that a user cannot act on, silenced on every machine.

Every rank would print them, and an error of one line would be the last of many.
"""

from __future__ import annotations

import logging
import warnings

QUIET_WARNINGS = (
    # `hunyuan-pretrain doctor` says once what is missing and what is used instead
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # internal to core; a user cannot act on them
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".*reduce_scatter_tensor. is deprecated",
    ".*all_gather_into_tensor. is deprecated",
    ".*load_state_dict. is deprecated",
    "Warning: tp_group is None",
    # from core's barriers in a save: the device is the one that train.setup has set. Passing it to init_process_group
    # instead would initialize NCCL eagerly, and unbatched messages between pipeline stages would share the communicator
    # of their whole group
    r"barrier\(\): using the device under current context",
    # core 0.19 imports and calls what it warns of itself
    "MimoModelConfig is experimental",
    # the fp32 routers have a buffer of their own behind the bf16 one, whose first bucket has been gathered by then;
    # their gathers, of a few KB per layer, do not overlap
    "The next bucket's parameter all-gather operation has already been",
    "The argument order of load has been changed",
    # an export reads a checkpoint in one process
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
)
"""Beginnings of warnings, as regular expressions."""

QUIET_LOGS = {
    # recommends the writer of a package that is not required here
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    # core 0.19's own reader calls it
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    # computed by core either way, with the same result
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # a CUDA compiler without a GPU: `hunyuan-pretrain doctor` says that there is no GPU
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Logger -> words of its messages."""


def quieten() -> None:
    """Silence the messages. Call it before megatron.core is imported; calling it again changes nothing."""
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, words in QUIET_LOGS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, _Without) for found in logger.filters):
            logger.addFilter(_Without(words))


class _Without(logging.Filter):
    """Lets every record pass that does not contain `words`."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
