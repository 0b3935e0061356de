"""Tensors in, tensors out: the arithmetic every rule shares. Imports torch only."""
