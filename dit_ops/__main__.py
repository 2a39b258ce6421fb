"""`python -m dit_ops …` is `dit-ops …`."""

import sys

from dit_ops.cli import main

sys.exit(main())
