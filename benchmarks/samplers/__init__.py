"""Whole samplers: their time without the network's, and the same loops in other packages."""
