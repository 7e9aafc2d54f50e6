"""``python -m proxydet_cli``: the command line where its script is not on the search path."""

import sys

from proxydet_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
