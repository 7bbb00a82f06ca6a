"""The mega-kernel's counters in all orders of their steps: nothing read too early or late, nobody waits for ever."""

from __future__ import annotations

import pytest

from tests.protocol_mega import FAULTS, Model, search, wander

# every order of these is looked at: ranks, programs of each, calls, of which one has a rank without rows
SMALL = {
    "two ranks, three calls in a ring of two": Model(2, calls=3, blocks=3, quiet=1),
    "two ranks of two programs": Model(2, programs=2, calls=2, blocks=3, quiet=1),
    "three ranks": Model(3, calls=2, blocks=1, quiet=1),
}
LARGE = {
    "three ranks of two programs": Model(3, programs=2, calls=3, blocks=3, quiet=2),
    "four ranks of three programs": Model(4, programs=3, calls=3, blocks=4, quiet=1),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_order_of_a_small_case_is_right(name: str) -> None:
    found = search(SMALL[name])
    assert found.wrong == ""
    assert found.states > 5000


@pytest.mark.parametrize("name", LARGE)
def test_orders_of_a_large_case_that_are_drawn_are_right(name: str) -> None:
    assert wander(LARGE[name], 40).wrong == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(fault: str) -> None:
    wrong = search(SMALL["two ranks, three calls in a ring of two"], fault).wrong
    # a rank of one program takes its tasks in their order, and so never overtakes itself in the ring
    wrong = wrong or wander(LARGE["three ranks of two programs"], 100, fault).wrong
    waits_for_ever = fault in ("lost signal", "pull waits for the next block")
    assert ("nobody can go on" if waits_for_ever else " in place of ") in wrong


def test_a_ring_of_one_wave_would_stop_everything() -> None:
    """A wave is pulled before the one ahead of it is computed, so the ring holds two."""
    assert "nobody can go on" in search(Model(2, ring=1)).wrong
