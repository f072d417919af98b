"""The algorithms, one file each."""

from .dps import DPS
from .fk import FK
from .latent import LatentPnP
from .pigdm import PiGDM
from .pnp import PnP
from .tds import TDS

__all__ = ["DPS", "FK", "TDS", "LatentPnP", "PiGDM", "PnP"]
