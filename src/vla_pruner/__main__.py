"""`python -m vla_pruner` is the same as `vla-pruner`."""

import sys

from vla_pruner.cli import main

sys.exit(main())
