"""Peak FLOP/s of GPUs, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

PEAK_FLOPS_PER_S = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362.1e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
)
"""(words in the device name, peak dense bf16 FLOP/s); the first entry whose words are all in the name counts. From
NVIDIA's data sheets, without sparsity. FP8 runs use the same number, so that MFU stays comparable."""


def peak_flops_per_s(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name ("NVIDIA H100 80GB HBM3"); None if it is not in the table."""
    words = device_name.replace("-", " ").split()
    return next((peak for names, peak in PEAK_FLOPS_PER_S if all(name in words for name in names.split())), None)
