"""Readers of annotation files, one a format; `proxydet.data.store` chooses between them."""
