"""``python -m optimum_mobilequant.cli``."""

import sys

from . import main

sys.exit(main())
