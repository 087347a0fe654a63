"""`python -m deltanet` is the command line."""

import sys

from deltanet.cli import main

sys.exit(main())
