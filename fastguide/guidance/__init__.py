"""The algorithms, one file each."""

from .daps import DAPS
from .dps import DPS
from .fk import FK
from .latent import LatentPnP
from .pigdm import PiGDM
from .pnp import PnP
from .tds import TDS

__all__ = ["DAPS", "DPS", "FK", "TDS", "LatentPnP", "PiGDM", "PnP"]
