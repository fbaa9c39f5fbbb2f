"""``python -m lojax``: see `lojax.cli.main`."""

import sys

from lojax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
