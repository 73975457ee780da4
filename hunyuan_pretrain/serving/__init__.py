"""Exports in other engines. What is here needs the engine and what that needs itself, and not megatron-core."""
