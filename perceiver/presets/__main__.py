"""`python -m perceiver.presets`: their table."""

import sys

from perceiver.catalog import main

sys.exit(main(sys.argv[1:]))
