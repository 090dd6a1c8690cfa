"""Where segments lie: on the device, in pinned memory of the host, and what leaves first when there is no room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from .copies import Copies, Held
from .counts import Counts
from .segment import Segment

# Segments come to the device in so many parts, a layer or a few each: the model reads the first while others come.
_PARTS = 32


class Tier:
    """Segments in one place, at most so many bytes of them; the one that was not used for longest leaves first."""

    def __init__(self, name: str, most: int | None) -> None:
        self.name = name
        self.most = most
        self.nbytes = 0
        self._held: OrderedDict[str, Held] = OrderedDict()

    def take(self, address: str) -> Held | None:
        """The segment, marked as used now; `None` if it is not here."""
        held = self._held.get(address)
        if held is not None:
            self._held.move_to_end(address)
        return held

    def fits(self, nbytes: int) -> bool:
        """Whether a segment of so many bytes can be here at all."""
        return self.most is None or nbytes <= self.most

    def put(self, held: Held) -> list[Held]:
        """Takes a segment that fits; returns those that had to leave for it."""
        self.drop(held.segment.address)
        self._held[held.segment.address] = held
        self.nbytes += held.segment.nbytes
        gone = []
        while self.most is not None and self.nbytes > self.most:
            address = next(iter(self._held))
            gone.append(self._held[address])
            self.drop(address)
        return gone

    def drop(self, address: str) -> None:
        """Lets a segment go, if it is here."""
        held = self._held.pop(address, None)
        if held is not None:
            self.nbytes -= held.segment.nbytes

    def __contains__(self, address: str) -> bool:
        return address in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)


class Tiers:
    """Segments in the memory of a device and of its host.

    A segment that is used comes to the device and stays until others need its room; then it is copied to the host, and
    from there it leaves for good. On CUDA copies run on a stream of their own, through pinned memory, and nobody waits
    for them but who uses the segment. Any thread may call any method.

    Args:
        device: Where segments are used.
        device_bytes, host_bytes: Most bytes in each; `None` is no bound.
        backed: Tells whether a segment can be had again when it has left both (it is on a shelf).
        counts: What is done is counted there.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: int | None,
        host_bytes: int | None,
        backed: Callable[[str], bool],
        counts: Counts | None = None,
    ) -> None:
        self.device = device
        self.on_device, self.on_host = Tier("device", device_bytes), Tier("host", host_bytes)
        self.counts = counts or Counts()
        self._backed = backed
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, segment: Segment) -> Held:
        """Takes a segment from the device, where it was computed, or from the host; returns it on the device."""
        with self._lock:
            # Whoever uses it, on any stream, waits for what is computed on this one.
            computed = segment.data.is_cuda
            held = Held(segment, (torch.cuda.current_stream(segment.data.device).record_event(),) if computed else ())
            if segment.data.device != self.device:
                self._to_host(held)
                (held,) = self._fetched([held])
            if not self.on_device.fits(segment.nbytes):
                self._to_host(held)
                return held
            for gone in self.on_device.put(held):
                self.counts.evicted["device"] += 1
                self._to_host(gone)
            return held

    def take(self, address: str) -> Held | None:
        """A segment that is in memory, on the device or on its way there; `None` if there is none."""
        return self.take_all([address])[0]

    def take_all(self, addresses: Sequence[str]) -> list[Held | None]:
        """Different segments, where they are in memory; those from the host come side by side, layer by layer."""
        with self._lock:
            found: dict[str, Held | None] = {}
            coming: list[Held] = []
            for address in addresses:
                if held := self.on_device.take(address):
                    self.counts.hits["device"] += 1
                elif there := self.on_host.take(address):
                    coming.append(there)
                found[address] = held
            for fetched in self._fetched(coming):
                self.counts.hits["host"] += 1
                found[fetched.segment.address] = fetched
                if self.on_device.fits(fetched.segment.nbytes):
                    for gone in self.on_device.put(fetched):
                        self.counts.evicted["device"] += 1
                        self._to_host(gone)
            return [found[address] for address in addresses]

    def read_in(self, segment: Segment, tier: str) -> Held:
        """Takes a segment that was read from a shelf into the host's memory; returns it on the device."""
        with self._lock:
            self.counts.hits[tier] += 1
            self.counts.moved[tier, "host"] += segment.nbytes
            return self.put(segment)

    def host_copy(self, held: Held) -> Segment:
        """The segment in the memory of the host, where files are written from; waits until it is there."""
        with self._lock:
            found = self.on_host.take(held.segment.address)
        found = found or self._copied_out(held)
        if found.ready:
            found.ready[-1].synchronize()
        return found.segment

    def drop(self, address: str) -> None:
        """Lets a segment go from both."""
        with self._lock:
            self.on_device.drop(address)
            self.on_host.drop(address)

    def __contains__(self, address: str) -> bool:
        with self._lock:
            return address in self.on_device or address in self.on_host

    def __len__(self) -> int:
        with self._lock:
            return len({*self.on_device, *self.on_host})

    def addresses(self) -> list[str]:
        """Of all segments in memory; those that the device used last come last."""
        with self._lock:
            return list(dict.fromkeys([*self.on_host, *self.on_device]))

    def buffer(self, elements: int, dtype: torch.dtype) -> Shaped[Tensor, " elements"]:
        """Memory of the host to read a segment into."""
        return torch.empty(elements, dtype=dtype, pin_memory=self._stream is not None)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier. A segment may be in both; without a GPU the two then share its memory."""
        with self._lock:
            return {tier.name: tier.nbytes for tier in (self.on_device, self.on_host)}

    def _to_host(self, held: Held) -> None:
        """Keeps a segment in the host's memory, if it fits there, when the device lets it go."""
        segment = held.segment
        if segment.address in self.on_host:
            return
        gone = [held]
        if self.on_host.fits(segment.nbytes):
            gone = self.on_host.put(self._copied_out(held))
            self.counts.evicted["host"] += len(gone)
        for one in gone:
            address = one.segment.address
            if address not in self.on_device and not self._backed(address):
                self.counts.lost += 1

    def _fetched(self, held: Sequence[Held]) -> list[Held]:
        """The segments on the device."""
        for one in held:
            self.counts.moved["host", "device"] += one.segment.nbytes
        if self._stream is None:
            return [Held(one.segment.with_data(one.segment.data.to(self.device))) for one in held]
        return self._copied(held, lambda data: torch.empty_like(data, device=self.device), _PARTS)

    def _copied_out(self, held: Held) -> Held:
        """The segment in the host's memory, pinned where there is CUDA."""
        self.counts.moved["device", "host"] += held.segment.nbytes
        if self._stream is None:
            return Held(held.segment.with_data(held.segment.data.cpu()))
        return self._copied([held], lambda data: self.buffer(data.numel(), data.dtype), 1)[0]

    def _copied(self, held: Sequence[Held], room: Callable[[Tensor], Tensor], parts: int) -> list[Held]:
        """Copies segments on the own stream, and begins to."""
        stream, sources = self._stream, [one.segment.data for one in held]
        assert stream is not None
        for one, data in zip(held, sources, strict=True):
            if one.ready:
                stream.wait_event(one.ready[-1])
            elif data.is_cuda:  # it may still be computed
                stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(stream):
            moved = [room(data) for data in sources]
            for data in sources:
                if data.is_cuda:
                    data.record_stream(stream)
        copies = Copies(stream, held, moved, parts)
        copies.begin(0)
        return [
            Held(x.segment.with_data(to), copies.events(i)) for i, (x, to) in enumerate(zip(held, moved, strict=True))
        ]
