"""Runs training steps over and over and says whether they are bit-identical, and where they part."""
