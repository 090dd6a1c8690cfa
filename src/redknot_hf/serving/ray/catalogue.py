"""Documents as the door knows them: by name alone, since it holds no weights and no keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.reuse.gate import Verdict
from redknot_hf.reuse.identity import segment_address
from redknot_hf.reuse.ids import Ids, as_ids
from redknot_hf.reuse.segment import SegmentRef

from .errand import MARK, Facts

Text = tuple[tuple[int, ...], tuple[int, ...]]
# Tokens of texts whose addresses are known here; of others the replicas are asked.
_KNOWN = 1 << 24


class Catalogue:
    """Stands for the replicas' stores where texts are named: addresses are those that they give.

    Args:
        facts: Of the replicas.
        plan: Theirs.
        find: Asks them for ids and prefix of an address; `None` if they know none.
    """

    def __init__(self, facts: Facts, plan: HeadPlan, find: Callable[[str], Text | None]) -> None:
        self.facts, self.plan, self._find = facts, plan, find
        self.model = SimpleNamespace(config=facts.config, generation_config=facts.generation_config)
        self._known: OrderedDict[str, Text] = OrderedDict()
        self._tokens = 0

    def ref(self, ids: Ids, prefix: Ids | None = None) -> SegmentRef:
        """Names a text, as `SegmentStore.ref` does.

        Raises:
            ValueError: It has no tokens, or some that the model does not know.
        """
        tokens, behind = as_ids(ids), as_ids(() if prefix is None else prefix)
        if not tokens:
            raise ValueError("the text has no tokens: leave it out")
        if not 0 <= min(tokens) <= max(tokens) < self.facts.words:
            raise ValueError(
                f"the text has ids from {min(tokens)} to {max(tokens)}: the model knows 0 to {self.facts.words - 1}"
            )
        assert self.facts.identity is not None
        address = segment_address(self.facts.identity, self.plan, "plan", tokens, behind)
        return self._ref(address, (tokens, behind))

    def named(self, address: str) -> SegmentRef:
        """The text of an address.

        Raises:
            ValueError: Neither the door nor any replica knows it.
        """
        found = self._known.get(address) or self._find(address)
        if found is None:
            raise ValueError(f"there is no segment {address!r:.80}: add its text to the store, which says its address")
        self._know(address, found)
        return self._ref(address, found)

    def know(self, ref: SegmentRef) -> None:
        """Remembers a text by its address."""
        self._know(ref.address, (ref.ids, ref.prefix))

    def verdict(self) -> Verdict:
        """What replicas found of reuse; how keys move is theirs."""
        return Verdict(None, 0.0, 0.0, self.facts.refused)

    def weights(self, refs: tuple[SegmentRef, ...]) -> dict[str, int]:
        """Bytes of each segment, by what routers know it by."""
        size = lambda ref: self.plan.nbytes(len(ref), self.facts.config, self.facts.dtype)  # noqa: E731
        return {ref.address[:MARK]: size(ref) for ref in refs}

    def _ref(self, address: str, text: Text) -> SegmentRef:
        mine: Any = self
        return SegmentRef(address, *text, mine)

    def _know(self, address: str, text: Text) -> None:
        if address not in self._known:
            self._tokens += sum(map(len, text))
        self._known[address] = text
        self._known.move_to_end(address)
        while self._tokens > _KNOWN and len(self._known) > 1:
            _, old = self._known.popitem(last=False)
            self._tokens -= sum(map(len, old))
