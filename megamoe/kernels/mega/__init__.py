"""The mega-kernel: dispatch, both products and combine of a rank in one launch over memory that all ranks map.

    layout.py     where everything lies, and how many bytes that is
    signals.py    counters between programs and ranks, and waits with a deadline
    dispatch.py   tokens encoded, counts and slots pushed to the experts' owners, rows pulled into the ring
    combine.py    results pushed to slot [token][k] at home, summed there in order
    kernel.py     the kernel: its tasks in their order
    call.py       the host's side: buffers, launches, what is said of a rank that never came
    builds.py     what is compiled ahead

docs/mega_kernel.md draws it.
"""
