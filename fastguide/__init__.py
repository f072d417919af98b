"""fastguide: inference-time guidance of diffusion models, fast.

A trained network, a measurement and a forward model go in; samples of ``x | y`` come out::

    prior = fastguide.Denoiser(net, fastguide.schedules.vp_cosine(1000), prediction="v")
    likelihood = fastguide.likelihoods.Gaussian(y, fastguide.operators.AveragePool(4), scale=0.1)
    out = fastguide.sample(prior, (1, 1, 8, 8), guidance=fastguide.TDS(likelihood, particles=256))
"""

from . import likelihoods, metrics, operators, ops, reference, schedules
from .capture import capture
from .denoiser import Conditional, Denoiser
from .evidence import StepComparison, compare_steps
from .guidance import DAPS, DPS, FK, TDS, LatentPnP, PiGDM, PnP
from .ops._operation import backends
from .sampling import Progress, Samples, sample

__version__ = "0.1.0"

__all__ = [
    "DAPS",
    "DPS",
    "FK",
    "TDS",
    "Conditional",
    "Denoiser",
    "LatentPnP",
    "PiGDM",
    "PnP",
    "Progress",
    "Samples",
    "StepComparison",
    "backends",
    "capture",
    "compare_steps",
    "likelihoods",
    "metrics",
    "operators",
    "ops",
    "reference",
    "sample",
    "schedules",
]
