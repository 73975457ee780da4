"""The model's layers, FP8 and attention by Transformer Engine, an optional package: nothing here is imported before
model/engines.py has chosen it.

Tests run it with CPU stand-ins for the kernels, which read memory as those do and prove the wiring and no kernel; with
those that quantise, FP8 steps are those of model/fp8/ bit by bit. tests/gpu runs the kernels.
"""
