"""`python -m normistral` is the command `normistral`."""

import sys

from normistral.cli import main

sys.exit(main())
