"""Mixture of experts: router, dispatch of tokens to ranks, experts, and the layer of them."""
