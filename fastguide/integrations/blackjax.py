"""The resampling of blackjax for JAX on the CPU: ``(rng_key, weights, num_samples) -> indices``, int32, ascending.

With ``from fastguide.integrations import blackjax as rs``, ``resampling_fn=rs.systematic`` takes the place of
``blackjax.smc.resampling.systematic``. The weights, ``[N]``, need not sum to one. It runs inside ``jax.jit``, ``scan``
and ``vmap`` as a callback of the host to `fastguide.ops.resample`: integer sums, exact however many weights there are,
where blackjax adds float32. Its uniforms are its own, seeded by ``rng_key``: the same law, other indices than
blackjax's. Where a weight is NaN, infinite or negative, or none is above 0, the indices are those of blackjax's own
function, which raises no error.
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


@partial(jax.jit, static_argnums=(0, 3))  # called outside of a jit, it is compiled once
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
    with np.errstate(divide="ignore", invalid="ignore"):  # weights of 0, and those that are not usable
        log_weights = torch.from_numpy(np.log(np.asarray(weights, np.float64)))
    # unchecked: under vmap both branches are computed for all rows, and the others' indices are dropped
    ancestors = ops.resample(log_weights, scheme=scheme, num=num_samples, seed=high << 32 | low, check=False)[0]
    return ancestors.numpy()


systematic = partial(_resample, "systematic")
stratified = partial(_resample, "stratified")
multinomial = partial(_resample, "multinomial")
residual = partial(_resample, "residual")
