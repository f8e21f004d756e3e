"""`python -m batchnorm.mpi`, on any number of ranks."""

import sys

from .check import main

sys.exit(main())
