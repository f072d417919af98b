"""Resampling functions for blackjax, in JAX on the CPU.

    from fastguide.integrations import blackjax as rs

``resampling_fn=rs.systematic`` then replaces ``blackjax.smc.resampling.systematic``, and so do the other schemes. The
functions run inside ``jax.jit``, ``scan`` and ``vmap``, as a callback on the host to `fastguide.ops.resample`.

Weights are summed as integers, so that sums are exact for any number of weights; blackjax sums in float32. The indices
follow the same distribution as blackjax's but are other numbers, because ``rng_key`` seeds fastguide's own generator.
Weights that cannot be used raise no error, as in blackjax: if one is NaN, infinite or negative, or none is above 0,
blackjax's own function chooses the indices.

Importing this module raises an ImportError where blackjax is not installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

try:
    import jax  # type: ignore
    import jax.numpy as jnp  # type: ignore
    from blackjax.smc import resampling as _theirs  # type: ignore
except ImportError as error:
    raise ImportError(
        f"fastguide.integrations.blackjax: expected blackjax to be installed (pip install blackjax), got: {error}"
    ) from error

from .. import ops
from ..arguments import got, integer

__all__ = ["multinomial", "residual", "stratified", "systematic"]


def _resample(scheme: str, rng_key: Any, weights: Any, num_samples: int) -> Any:
    try:
        weights = jnp.asarray(weights)
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights: expected numbers [N], got {got(weights)}") from error
    if weights.ndim != 1 or not weights.size:
        raise ValueError(f"weights: expected shape [N] with N >= 1, got {list(weights.shape)}")
    return _jitted(scheme, rng_key, weights, integer("num_samples", num_samples, 1))


@partial(jax.jit, static_argnums=(0, 3))  # compiled once, also for calls outside a jit
def _jitted(scheme: str, rng_key: Any, weights: Any, num_samples: int) -> Any:
    weights = jax.lax.stop_gradient(weights)  # a callback has no JVP

    def ours(rng_key: Any, weights: Any) -> Any:
        seed = jax.random.bits(rng_key, (2,), np.uint32)
        indices = jax.ShapeDtypeStruct((num_samples,), np.int32)
        return jax.pure_callback(
            partial(_on_host, scheme, num_samples), indices, seed, weights, vmap_method="sequential"
        )

    def theirs(rng_key: Any, weights: Any) -> Any:
        return getattr(_theirs, scheme)(rng_key, weights, num_samples).astype(np.int32)

    usable = (jnp.isfinite(weights) & (weights >= 0)).all() & (weights > 0).any()
    return jax.lax.cond(usable, ours, theirs, rng_key, weights)


def _on_host(scheme: str, num_samples: int, seed: Any, weights: Any) -> Any:
    high, low = map(int, seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # weights of 0, and unusable ones
        log_weights = torch.from_numpy(np.log(np.asarray(weights, np.float64)))
    # unchecked: under vmap both branches run for all rows, and the indices of unusable rows are dropped
    ancestors = ops.resample(log_weights, scheme=scheme, num=num_samples, seed=high << 32 | low, check=False)[0]
    return ancestors.numpy()


systematic = partial(_resample, "systematic")
"""Systematic resampling: ``systematic(rng_key, weights, num_samples)``.

Args:
    rng_key (jax.Array): A key of ``jax.random``.
    weights (jax.Array): ``[N]``, N >= 1, numbers >= 0. They need not sum to one.
    num_samples (int): How many indices to draw, an integer >= 1.

Returns:
    jax.Array: Ascending indices ``[num_samples]`` in int32.

Raises:
    TypeError: ``weights`` are not numbers.
    ValueError: ``weights`` has another shape, or ``num_samples`` is not an integer >= 1.
"""

stratified = partial(_resample, "stratified")
"""Stratified resampling, with the arguments of `systematic`."""

multinomial = partial(_resample, "multinomial")
"""Multinomial resampling, with the arguments of `systematic`."""

residual = partial(_resample, "residual")
"""Residual resampling with multinomial remainders, with the arguments of `systematic`."""
