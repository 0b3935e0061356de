"""Weights that are trained in a low-bit format: no float copy of them exists."""
