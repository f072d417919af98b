"""The operations.

`fastguide.reference` says in plain PyTorch what each must compute. ``backend="auto"`` takes the fastest that can serve
a call, a named one that cannot raises its reason: see `fastguide.backends`.
"""

from ._arguments import DynamicThreshold
from .gather_particles import gather_particles_
from .log_prob_and_gradient import log_prob_and_gradient
from .predict_x0 import predict_x0
from .propose_and_weigh import propose_and_weigh
from .randn import randn
from .resample import resample
from .reverse_step import reverse_step
from .solve_positive_part import solve_positive_part

__all__ = [
    "DynamicThreshold",
    "gather_particles_",
    "log_prob_and_gradient",
    "predict_x0",
    "propose_and_weigh",
    "randn",
    "resample",
    "reverse_step",
    "solve_positive_part",
]
