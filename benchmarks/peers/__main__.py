"""python -m benchmarks.peers, from the root of the repository."""

from benchmarks.command import run
from benchmarks.peers.run import main

if __name__ == "__main__":
    run(main)
