"""`python -m gap_diff_diffusers` is `gap-diff`."""

import sys

from .cli import main

sys.exit(main())
