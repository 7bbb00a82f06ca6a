"""The doctor: looks at a machine before ranks run on it, and says of every finding what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megamoe.catalog.wording import plural
from megamoe.launch.devices import device_type, present_device
from megamoe.launch.doctor import machine, software
from megamoe.launch.doctor.check import Check, Diagnosis, Examination, Link, LookAt
from megamoe.launch.doctor.exchange import exchange
from megamoe.parallel.interfaces import choose

LOOK_AT: tuple[LookAt, ...] = (*software.LOOK_AT, *machine.LOOK_AT)


def examination(
    *, ranks: int, device: str | None, interface: str | None, deadline_s: float, exchange: bool
) -> Examination:
    """What to examine; without a device type the one that is here.

    ValueError for what makes no sense, an unknown device type, and an interface that is not there, with those that are.
    """
    name = present_device() if device is None else device_type(device).name
    if interface is not None:
        choose(name=interface)
    return Examination(ranks, name, interface, deadline_s, exchange)


def examine(
    asked: Examination,
    progress: Callable[[str], None] = lambda _: None,
    look_at: Sequence[LookAt] = LOOK_AT,
    between: Callable[[Examination], tuple[list[Check], list[Link]]] = exchange,
) -> Diagnosis:
    """Everything looked at in order, then tried between ranks. progress is told what comes next."""
    checks = []
    for look in look_at:
        progress(_title(look))
        checks.append(_looked(look, asked))
    progress(f"starting {plural(asked.ranks, 'rank')}")
    tried, links = between(asked)
    return Diagnosis((*checks, *tried), tuple(links))


def _looked(look: LookAt, asked: Examination) -> Check:
    try:
        return look(asked)
    except Exception as error:  # noqa: BLE001  what one check trips over is a finding, and no reason to drop the rest
        found = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(_title(look), "warn", found, "report this line as a bug, with the system that it is from")


def _title(look: LookAt) -> str:
    name: str = look.__name__
    return name.replace("_", " ")
