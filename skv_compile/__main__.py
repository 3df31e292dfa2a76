"""``python -m skv_compile`` is the ``skv`` command."""

import sys

from skv_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
