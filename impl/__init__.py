"""Megatron-style parallel training: the reference implementation."""
