"""`python -m latte_scale.run CONFIG [key=value ...]` prints the run folder, for scripts."""

import sys

from latte_scale.run.folder import main

sys.exit(main())
