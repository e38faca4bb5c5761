"""`python -m worker.simulator`."""

import sys

from worker.simulator.command import main

sys.exit(main())
