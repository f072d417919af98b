"""Phantoms of random ellipses, 64 x 64 pixels, for tomography: `phantoms.generate(2, seed=0)`."""

from .generator import generate

__all__ = ["generate"]
