"""The model's layers, FP8 and attention on Transformer Engine, an optional package: nothing here is imported before
model/engines.py has chosen it.

Tests run it with CPU stand-ins for the kernels, which read memory as the kernels do. They verify the wiring, not the
kernels; with the quantising stand-ins, FP8 steps are bitwise identical to those of model/fp8/. tests/gpu runs the
kernels.
"""
