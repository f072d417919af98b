"""Whole samplers: what of their time is not the network's own, and the same loops elsewhere."""
