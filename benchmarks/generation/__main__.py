"""python -m benchmarks.generation, from the root of the repository."""

from benchmarks.command import run
from benchmarks.generation.run import main

if __name__ == "__main__":
    run(main)
