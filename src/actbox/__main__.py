"""`python -m actbox`: the command line."""

import sys

from actbox.cli import main

sys.exit(main())
