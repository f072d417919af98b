"""Ancestors of every kind, and the states after moving: for the tests of gather_particles_."""

import torch


def bytes_of(rows: int, particles: int, size: int, seed: int = 0) -> torch.Tensor:
    """Particles that all differ, if they have enough bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, particles, size), generator=generator, dtype=torch.uint8)


def indexed(ancestors: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[a.long()] for row, a in zip(state, ancestors, strict=True)])


def uniform(particles: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(particles, (particles,), generator=torch.Generator().manual_seed(seed))


def survivors(particles: int, seed: int = 0) -> torch.Tensor:
    """Ancestors that are their own ancestors, as ``resample(sorted=False)`` returns them."""
    chosen = uniform(particles, seed)
    places = torch.arange(particles)
    alive = torch.isin(places, chosen)
    return torch.where(alive, places, chosen)


MAPS = {
    "uniform": uniform,
    "survivors in place": survivors,
    "ascending": lambda k: uniform(k).sort().values,
    "descending": lambda k: uniform(k).sort().values.flip(0),
    "identity": torch.arange,
    "reversed": lambda k: torch.arange(k).flip(0),
    "one cycle": lambda k: torch.arange(k).roll(1),
    "the other way": lambda k: torch.arange(k).roll(-1),
    "a permutation": lambda k: torch.randperm(k, generator=torch.Generator().manual_seed(3)),
    "the first": lambda k: torch.zeros(k, dtype=torch.int64),
    "the last": lambda k: torch.full((k,), k - 1),
}
