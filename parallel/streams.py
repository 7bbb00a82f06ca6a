"""Where a device's work is queued: compute in the caller's stream, messages in one beside it, both at once.

A message waits for what it sends and for nothing else, and compute for what it reads. On a CPU there are no queues.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A block in which launches go to this device of an accelerator, whichever is current outside of it."""
    make = None if device.type == "cpu" else getattr(torch.get_device_module(device), "device", None)
    return nullcontext() if make is None else make(device)


def synchronize(device: torch.device) -> None:
    """Returns when a device has done what is queued in its current stream; of an accelerator without streams, all."""
    module = torch.get_device_module(device)
    stream = module.current_stream(device) if hasattr(module, "current_stream") else module
    getattr(stream, "synchronize", module.synchronize)()


def make_current(device: torch.device) -> None:
    """Makes a device of an accelerator the current one of this process. RuntimeError, torch's own, for one that is not
    there."""
    if device.type != "cpu" and device.index is not None:
        torch.get_device_module(device).set_device(device)


class Streams:
    """The stream of a group's messages on one device; compute is whatever stream is current where this is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._messages: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._messages = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def hand_over(self) -> None:
        """Has messages that are sent from now on wait for the compute that is queued by now, and for none after it."""
        if self._messages is not None:
            self._messages.wait_stream(torch.cuda.current_stream(self._device))

    def messages(self) -> AbstractContextManager[object]:
        """A block that queues messages. What it opens is waited for outside of it, so by compute."""
        return nullcontext() if self._messages is None else torch.cuda.stream(self._messages)


class Stopwatch:
    """How long a CUDA device computes, in intervals, `with stopwatch:` around each; read after the last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[-1].record(torch.cuda.current_stream(self._device))

    def read_s(self) -> float:
        """Seconds of all intervals. Waits for the last one to end."""
        self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        milliseconds: float = sum(begun.elapsed_time(ended) for begun, ended in pairs)
        return milliseconds / 1e3
