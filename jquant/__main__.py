"""`python -m jquant` is the `jquant` command."""

import sys

from jquant.cli import main

sys.exit(main())
