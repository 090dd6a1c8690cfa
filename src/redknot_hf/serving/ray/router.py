"""The router of Ray Serve: who holds most of a request gets it, and whoever is full is passed by.

Ray takes this module apart and puts it together anew in other processes, so what others share is in a module besides.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import RequestRouter

from redknot_hf.serving.routing import Replica, marks, ranked

from . import board
from .errand import Want

# Requests of which a router remembers who got them.
_REMEMBERED = 4096


class SegmentRouter(RequestRouter):
    """Ranks replicas by `redknot_hf.serving.routing.ranked`.

    Replicas tell what they hold every now and then. Until they have told of a request, the router goes by its own
    memory of who got it, so that two requests for one document that come close together do not part.
    """

    def initialize_state(self, trust: float | int = 10) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by Ray.

        Args:
            trust: Seconds for which a replica is taken to hold what it was sent.
        """
        self._trust = trust
        self._sent: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Replicas one by one, in the order in which they are tried; Ray passes those by that are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when all are full
        want, known = _wanted(pending_request), {x.replica_id.unique_id: x for x in candidate_replicas}
        begun = marks(want.prompt)
        told = [self._told(replica, want, begun) for replica in candidate_replicas]
        order = [known[one.name] for one in ranked(told, [*want.segments], want.prompt)]
        order.sort(key=lambda replica: replica.replica_id.unique_id in want.avoid)
        return [[replica] for replica in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Remembers who got a request."""
        want, until = _wanted(pending_request), time.monotonic() + self._trust
        for mark in (*want.segments, *marks(want.prompt)):
            self._sent[replica_id.unique_id, mark] = until
            self._sent.move_to_end((replica_id.unique_id, mark))
        while len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Ray with what replicas tell."""
        board.TOLD[self._deployment_id.name] = {x.replica_id.unique_id: dict(x.routing_stats or {}) for x in replicas}
        super().update_replicas(replicas)

    def _told(self, replica: Any, want: Want, begun: list[str]) -> Replica:
        name, stats = replica.replica_id.unique_id, replica.routing_stats or {}
        segments, prefixes, now = {*stats.get("segments", ())}, {*stats.get("prefixes", ())}, time.monotonic()
        sent = lambda mark: self._sent.get((name, mark), 0) > now  # noqa: E731
        load = self.replica_queue_len_cache.get(replica.replica_id)
        return Replica(
            name,
            load=0 if load is None else load,
            most=replica.max_ongoing_requests,
            segments={mark: size for mark, size in want.segments.items() if mark in segments or sent(mark)},
            prefixes=[mark for mark in begun if mark in prefixes or sent(mark)],
        )


def _wanted(request: Any) -> Want:
    first = request.args[0] if request is not None and request.args else None
    return first if isinstance(first, Want) else Want()
