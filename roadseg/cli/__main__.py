"""`python -m roadseg.cli`."""

import sys

from roadseg.cli.main import main

sys.exit(main())
