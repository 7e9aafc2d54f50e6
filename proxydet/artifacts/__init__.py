"""Catalogue, transfer, unpacking and verification of files that users download."""
