"""python -m benchmarks.gpu_kernels, from the root of the repository."""

import sys

from benchmarks.gpu_kernels.run import main

if __name__ == "__main__":
    sys.exit(main())
