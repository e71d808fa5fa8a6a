"""`python -m obr`: the command `obr`."""

import sys

from obr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
