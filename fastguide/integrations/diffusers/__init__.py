"""diffusers: its schedulers with fused steps, and its models as priors."""

from .models import codec, denoiser, from_pipeline

__all__ = ["codec", "denoiser", "from_pipeline"]
