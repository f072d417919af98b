"""``python -m fastguide`` is the ``fastguide`` command."""

import sys

from .cli import main

sys.exit(main())
