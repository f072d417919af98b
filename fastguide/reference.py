"""The operations in plain PyTorch: what every kernel must compute.

A function here has the formula; the operation of the same name in `fastguide.ops` has the checks, the arguments and the
fast kernels. References run on any device and with any supported dtype, and check little.

Symbols, the same in every backend:

- ``N`` is the number of samples or particles, and ``*event`` the shape of one.
- ``B`` is the number of observations. Each has ``K`` particles.
- ``x_t = alpha_t x_0 + sigma_t eps``. A step goes from level ``t`` to the lower level ``s``.
- ``coefficients`` is ``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``, each a float or a tensor ``[N]``.
- ``z`` are standard normals from counters, see `randn`.

States are float16, bfloat16, float32 (arithmetic in float32) or float64 (arithmetic in float64).
"""

from .ops._arguments import PREDICTIONS, DynamicThreshold
from .ops.gather_particles.reference import gather_particles_
from .ops.log_prob_and_gradient.reference import FAMILIES, density_constant, log_factorials, log_prob_and_gradient
from .ops.predict_x0.reference import output_from_x0, predict_x0, predict_x0_vjp, x0_coefficients, x0_from_output
from .ops.propose_and_weigh.reference import propose_and_weigh
from .ops.randn.reference import philox, randn
from .ops.resample.reference import SCHEMES, integer_weights, resample
from .ops.reverse_step.reference import (
    clip_x0,
    dynamic_bound,
    reverse_step,
    reverse_step_vjp,
    scaled,
    step_coefficients,
)
from .ops.solve_positive_part.reference import solve_positive_part

__all__ = [
    "FAMILIES",
    "PREDICTIONS",
    "SCHEMES",
    "DynamicThreshold",
    "clip_x0",
    "density_constant",
    "dynamic_bound",
    "gather_particles_",
    "integer_weights",
    "log_factorials",
    "log_prob_and_gradient",
    "output_from_x0",
    "philox",
    "predict_x0",
    "predict_x0_vjp",
    "propose_and_weigh",
    "randn",
    "resample",
    "reverse_step",
    "reverse_step_vjp",
    "scaled",
    "solve_positive_part",
    "step_coefficients",
    "x0_coefficients",
    "x0_from_output",
]
