"""Readers of annotation files, one a format; `reader` chooses between them."""
