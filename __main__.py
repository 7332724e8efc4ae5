"""Run the command line as `python -m blockloom`."""

import sys

from .cli import main

sys.exit(main())
