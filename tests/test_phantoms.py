"""The phantoms: that each stays the same and looks like a head."""

import numpy as np
import pytest
import torch

from fastguide import phantoms
from fastguide.phantoms import generator


def test_a_phantom_depends_on_its_seed_and_index_alone():
    ten = phantoms.generate(10, seed=3)
    assert torch.equal(phantoms.generate(100, seed=3)[:10], ten)  # in more than one block
    assert torch.equal(phantoms.generate(4, seed=3, first=6), ten[6:])
    far = phantoms.generate(2, seed=3, first=2**40)
    assert torch.equal(phantoms.generate(1, seed=3, first=2**40 + 1)[0], far[1])
    several = torch.cat([ten, phantoms.generate(10, seed=4), far]).flatten(1)
    assert torch.cdist(several, several).fill_diagonal_(torch.inf).min() > 5


def test_phantoms_never_change():
    """Numbers kept from the first version; the last bits of a sine belong to the machine."""
    x = phantoms.generate(64, seed=0)
    assert x.double().mean().item() == pytest.approx(-0.5759127, abs=1e-5)
    row = [-0.28895, -0.28895, -0.53616, -0.53616, -0.28895, -0.53616, -0.53567, -0.49142]
    assert x[5, 0, 32, 16:48:4].tolist() == pytest.approx(row, abs=2e-5)


def test_phantoms_are_heads():
    x = phantoms.generate(200, seed=1)
    assert x.shape == (200, 1, 64, 64) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() <= 1
    assert (x[:, :, [0, -1]] == -1).all() and (x[:, :, :, [0, -1]] == -1).all()  # nothing touches the border
    assert (x.amax((1, 2, 3)) > 0.25).all()  # the skull
    middle = x[:, 0, 28:36, 28:36].flatten(1)
    assert middle.mean() < 0.1 and middle.std(1).median() > 0.1  # the brain, which is not uniform
    spread = x.std(0)[0, 20:44, 20:44]
    assert spread.min() > 0.2  # no pixel of the inside is the same in all


def test_edges_are_anti_aliased():
    """The grey above the background sums to the area, however an ellipse lies on the grid."""
    for x0, a, b in ((0.0, 0.5, 0.5), (0.013, 0.31, 0.4), (-0.2, 0.11, 0.08)):
        brain = a / 2  # of the same grey as the skull
        halves = np.array([[a, brain]]), np.array([[b, brain]])
        image = generator._render(
            *np.full((2, 1, 2), x0), *halves, np.full((1, 2), 0.3), np.zeros((1, 2)), np.ones((1, 2), bool)
        )
        assert (image + 1).sum() * (2 / 64) ** 2 == pytest.approx(np.pi * a * b, rel=0.03)


def test_errors_name_the_argument():
    for wrong in (dict(number=-1), dict(seed=-1), dict(seed=2**64), dict(seed=0.5), dict(first=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected an integer"):
            phantoms.generate(**(dict(number=1, seed=0) | wrong))
    assert phantoms.generate(0, seed=0).shape == (0, 1, 64, 64)
    assert phantoms.generate(1, seed=2**64 - 1, dtype=torch.float64).dtype == torch.float64
