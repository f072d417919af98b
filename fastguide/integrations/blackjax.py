"""The resampling of blackjax for JAX on the CPU: ``(rng_key, weights, num_samples) -> indices``, int32, ascending.

``resampling_fn=fastguide.integrations.blackjax.systematic`` in place of ``blackjax.smc.resampling.systematic``. The
weights, ``[N]``, need not sum to one. Runs inside ``jax.jit``, ``scan`` and ``vmap`` as a callback of the host to
`fastguide.ops.resample`: integer sums, exact however many weights there are, where blackjax adds float32. Its uniforms
are its own, seeded by ``rng_key``: the same law, other indices than blackjax's. A NaN or infinite weight, or none above
0, is an error.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax  # type: ignore
import numpy as np
import torch

from .. import ops

__all__ = ["multinomial", "residual", "stratified", "systematic"]


def _resample(scheme: str, rng_key: Any, weights: Any, num_samples: int) -> Any:
    seed = jax.random.bits(rng_key, (2,), np.uint32)
    num_samples = int(num_samples)
    indices = jax.ShapeDtypeStruct((num_samples,), np.int32)
    on_host, weights = partial(_on_host, scheme, num_samples), jax.lax.stop_gradient(weights)  # a callback has no JVP
    return jax.pure_callback(on_host, indices, seed, weights, vmap_method="sequential")


def _on_host(scheme: str, num_samples: int, seed: Any, weights: Any) -> Any:
    high, low = map(int, seed)
    with np.errstate(divide="ignore"):  # weights of 0
        log_weights = torch.from_numpy(np.log(np.asarray(weights, np.float64)))
    ancestors = ops.resample(log_weights, scheme=scheme, num=num_samples, seed=high << 32 | low)[0]
    return ancestors.numpy()


systematic = partial(_resample, "systematic")
stratified = partial(_resample, "stratified")
multinomial = partial(_resample, "multinomial")
residual = partial(_resample, "residual")
