"""Annotations, images, transforms, sampling and batches."""
