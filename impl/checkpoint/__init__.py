"""Checkpoints that are saved at one layout and loaded at any other."""
