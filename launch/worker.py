"""python -m megamoe.launch.worker: the worker under torchrun, once for every rank."""

from megamoe.launch.cluster.torchrun import main

if __name__ == "__main__":
    main()
