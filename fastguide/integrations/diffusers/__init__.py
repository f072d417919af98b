"""diffusers: its schedulers with fused steps, and its models as priors."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastguide.integrations.diffusers: expected diffusers to be installed (pip install diffusers), got: {error}"
    ) from error

from .models import codec, denoiser, from_pipeline
from .schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    accelerate,
)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "accelerate",
    "codec",
    "denoiser",
    "from_pipeline",
]
