"""Quantized arrays: what they hold, and how each kind is computed and undone."""
