"""`python -m splitfrozen` is the console script."""

import sys

from splitfrozen.cli import main

sys.exit(main())
