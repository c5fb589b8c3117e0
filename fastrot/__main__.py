"""``python -m fastrot``."""

import sys

from fastrot.cli import main

sys.exit(main())
