"""Tensor names and shapes of the published models."""
