"""Looks at the machine and its packages and compares them with the published training; needs no torch."""
