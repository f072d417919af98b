"""The operations: fused kernels, each with a reference in plain PyTorch.

`fastguide.reference` has a function of the same name for each operation. It says what every kernel must compute. Each
operation takes ``backend``. ``"auto"`` chooses the fastest backend that can serve the call. A named backend raises its
reason if it cannot. `fastguide.backends` lists the names.
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
