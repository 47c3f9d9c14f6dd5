"""`python -m l2c` is the console script."""

import sys

from l2c.cli import main

sys.exit(main())
