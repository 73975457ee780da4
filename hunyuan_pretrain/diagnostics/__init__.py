"""Compares two ways of training the same model: `parity` across layouts, `shadow` across number formats."""
