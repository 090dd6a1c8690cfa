"""The store of segments: texts are prefilled once, and their keys and values are had again from memory or disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.span import Span, same_places
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.per_layer import text_config
from redknot_hf.plan.plan import HeadPlan, as_plan

from .coarse import Coarse
from .copies import Held
from .counts import Counts
from .encoding import outline
from .gate import Verdict, gate
from .identity import model_identity, segment_address, weights_state
from .ids import Ids, as_ids
from .recording import Keep, batches, record
from .segment import Segment, SegmentRef
from .shelf import Entry
from .shelves import opened
from .stand_in import StandIn
from .texts import TakesTexts
from .tiers import Tiers

GIB = 2**30


class SegmentStore(TakesTexts):
    """Keys and values of texts, for one model and plan.

    `add` prefills a text once; `redknot_hf.assemble` builds caches of what was added. Segments lie on the device, in
    pinned memory of the host, on a disk and on a server that machines share; the nearest that has one gives it, and in
    each the one that was not used for longest makes room. What has left memory and lies nowhere else is computed anew
    when it is asked for. Any thread may use a store; forward passes take turns.

    Source: RedKnot, arXiv 2606.06256 (position-independent reuse); the per-head part of it is ours.

    Args:
        model: A causal LM with `attn_implementation="redknot"`.
        plan: What every KV head sees and keeps, or the file of a plan.
        device_bytes, host_bytes: Most bytes in the memory of the device and of the host; `None` is no bound.
        path: A folder, which every segment is written to as well. Other processes may use the same. A URL is taken for
            `remote`.
        disk_bytes: Most bytes of that folder, whoever wrote them.
        remote: What machines share: `redis://`, or a URL that fsspec knows (`s3://bucket/kv`). It may go away:
            segments are computed while it does not answer.
        remote_bytes, ttl: Most bytes of it, whoever wrote them; and the seconds that Redis keeps what is not used.
        keep: `"plan"` keeps what the plan lets a later context need; `"full"` all tokens of all heads, for `refresh`.
        storage: How they are held everywhere, and sent: `"model"` as the model made them, `"int8"` or `"int4"`.
        identity: Name of the model and its weights, where hashing them is not wanted or not possible.
        stand_in: What comes between the prefix of a text and the text while it is prefilled, in the place of what will
            stand there when it is reused; token ids, or a `StandIn` made of documents.
        page_size, impl: Of the caches that texts are prefilled with.

    Attributes:
        counts: What the store has done so far.

    Raises:
        ValueError: The plan does not fit the model, the model cannot be served, or an argument is off.
        ConnectionError: `remote` does not answer, at the beginning.
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        model: Any,
        plan: HeadPlan | AnyPath,
        *,
        device_bytes: int | None = GIB,
        host_bytes: int | None = 8 * GIB,
        path: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        remote: str | None = None,
        remote_bytes: int | None = None,
        ttl: float | int | None = None,
        keep: str = "plan",
        storage: str = "model",
        identity: str | None = None,
        stand_in: StandIn | Ids | None = None,
        page_size: int = 64,
        impl: str | None = None,
    ) -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"keep={keep!r}: choose one of {get_args(Keep)}")
        self.model, self.plan = model, as_plan(plan, model.config)
        self.keep: Keep = keep  # pyright: ignore[reportAttributeAccessIssue]
        self.coarse = Coarse.of(storage, model)
        self.page_size, self.impl = page_size, impl
        self.stand_in = StandIn.taken(stand_in)
        self._name = identity
        self.identity, self._weights = self._identity(), weights_state(model)
        self._named: dict[str, SegmentRef] = {}
        self.counts = Counts()
        self.shelves = opened(self.identity, self.counts.add, path, remote, disk_bytes, remote_bytes, ttl)
        self.tiers = Tiers(input_device(model), device_bytes, host_bytes, self.shelves.known, self.counts)
        self._computing = threading.Lock()
        self._verdict: Verdict | None = None
        self._like: Segment | None = None
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="redknot-segments")

    def add(self, ids: Ids, prefix: Ids | SegmentRef | None = None, *, stand_in: bool = True) -> SegmentRef:
        """Prefills a text, unless the store has it, and keeps its keys and values.

        Args:
            ids: Its tokens.
            prefix: What it is read behind and not stored with it: `<bos>`, a system prompt. Without one, the first
                tokens of the text take the role that the first tokens of a prompt have for the model (attention
                sinks), and keep it wherever they are reused.
            stand_in: Whether the store's stand-in follows the prefix. Say no where just the prefix will stand before
                the text, which then needs no recomputing. A text without a prefix has none.

        Raises:
            ValueError: There are no tokens, or the model's weights have changed since the store was made.
        """
        return self.add_all([ids], prefix, stand_in=stand_in)[0]

    def add_all(
        self, texts: Sequence[Ids], prefix: Ids | SegmentRef | None = None, *, stand_in: bool = True
    ) -> list[SegmentRef]:
        """Adds several texts behind one prefix, in batches of texts of like length; as `add`."""
        refs = [self.ref(text, prefix, stand_in=stand_in) for text in texts]
        self.check_weights()
        self._named.update({ref.address: ref for ref in refs})
        with self._computing:
            absent = {ref.address: ref for ref in refs if not self._has(ref.address)}
            for batch in batches(sorted(absent.values(), key=lambda ref: (ref.prefix, len(ref)))):
                self.counts.add("computed", len(batch))
                self._compute(batch)
        return refs

    def ref(self, ids: Ids, prefix: Ids | SegmentRef | None = None, *, stand_in: bool = True) -> SegmentRef:
        """Names a text without computing anything; what is not in the store then is when it is first used."""
        known = isinstance(prefix, SegmentRef)
        behind = (*prefix.prefix, *prefix.ids) if known else as_ids(() if prefix is None else prefix)
        tokens = as_ids(ids)
        if not tokens:
            raise ValueError("the text has no tokens: leave it out")
        words = text_config(self.model).vocab_size
        if not 0 <= min(tokens) <= max(tokens) < words:
            raise ValueError(f"the text has ids from {min(tokens)} to {max(tokens)}: the model knows 0 to {words - 1}")
        if behind and stand_in:
            behind += self.stand_in.before(tokens)
        storage = "model" if self.coarse is None else self.coarse.storage
        address = segment_address(self.identity, self.plan, self.keep, tokens, behind, storage)
        return SegmentRef(address, tokens, behind, self)

    def named(self, address: str) -> SegmentRef:
        """The text of this address: one that was added here, or that lies on disk or in the remote tier.

        Raises:
            ValueError: There is none.
        """
        found = self._named.get(address)
        if found is None and (said := self.shelves.text_of(address)) is not None:
            found = self.ref(*said, stand_in=False)
        if found is None or found.address != address:
            raise ValueError(f"there is no segment {address!r:.80}: add its text to the store, which says its address")
        return found

    def get(self, ref: SegmentRef) -> Segment:
        """The stored keys and values of a text, on the device; computed anew if the store has lost them."""
        held = self.tiers.take(ref.address)
        if held is None and self.shelves:
            held = self._read(self.outline(ref))
        return (held or self._again(ref)).here()

    def fetch(self, refs: Sequence[SegmentRef]) -> list[Held]:
        """Brings the keys and values of several texts to the device, as `get` does; copies may still be under way."""
        wanted = {ref.address: ref for ref in refs}  # once, however often a text is named
        held = dict(zip(wanted, self.tiers.take_all([*wanted]), strict=True))
        absent = [address for address, one in held.items() if one is None] if self.shelves else []
        reading = {address: self._readers.submit(self._read, self.outline(wanted[address])) for address in absent}
        for address, future in reading.items():
            held[address] = future.result()
        found = {address: one or self._again(wanted[address]) for address, one in held.items()}
        return [found[ref.address] for ref in refs]

    def keep_read(self, ids: Ids, span: Span) -> SegmentRef:
        """Keeps what a cache has read of a text, as `add` would have read it with nothing before it.

        Args:
            ids: All tokens that the span is of.
            span: Of a cache of this model and plan, from its first token on. Not changed; its data may become the
                store's.

        Raises:
            ValueError: The span is of another length, or lacks what the store keeps of a text.
        """
        ref = self.ref(ids)
        wanted = self.outline(ref)
        if span.tokens != len(ref) or not same_places(span.layers, wanted.layers, span.tokens):
            raise ValueError(
                f"a span of {span.tokens} tokens cannot stand for a text of {len(ref)} in a store that keeps "
                f"{self.keep!r}: give the ids of all that the cache has read, under the store's plan"
            )
        self.check_weights()
        self._named[ref.address] = ref
        segment = Segment(ref.address, ref.ids, (), wanted.layers, span.data)
        self._keep(segment.coarsened(self.coarse))
        return ref

    def drop(self, ref: SegmentRef | str) -> None:
        """Forgets a text, or what lies at an address, in memory, on disk and in the remote tier.

        Raises:
            ValueError: It is no address.
            OSError: It cannot be deleted there now.
        """
        address = ref if isinstance(ref, str) else ref.address
        self.tiers.drop(address)
        self._named.pop(address, None)
        self.shelves.drop(address)

    def stored(self) -> list[Entry]:
        """What lies on disk and in the remote tier, of whichever model and plan; `drop(entry.address)` deletes it."""
        return self.shelves.entries()

    def check_weights(self) -> None:
        """Raises if what is stored is no longer the model's.

        Raises:
            ValueError: The weights, or which adapters are on, have changed since the store was made.
        """
        state = weights_state(self.model)
        if state == self._weights:
            return
        if self._identity() != self.identity:
            raise ValueError(
                "the model's weights, its dtype or its adapters have changed since the store was made: what is stored "
                "is another model's. Make a new SegmentStore; the old one's files stay good for the old model."
            )
        self._weights = state

    def verdict(self) -> Verdict:
        """Whether the model's segments can be reused; found out once, by the first who asks."""
        with self._computing:
            if self._verdict is None:
                self._verdict = gate(self.model, self.plan, page_size=self.page_size, impl=self.impl)
            return self._verdict

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held in memory, by tier."""
        return self.tiers.nbytes

    def __contains__(self, ref: SegmentRef) -> bool:
        return self._has(ref.address)

    def __repr__(self) -> str:
        held = ", ".join(f"{n / 2**20:.1f} MiB on {name}" for name, n in self.nbytes.items())
        texts = len(self.tiers)
        return f"SegmentStore({texts} text{'s' * (texts != 1)} in memory, {held}{self.shelves}; {self.counts})"

    def _identity(self) -> str:
        return model_identity(self.model) if self._name is None else self._name

    def _has(self, address: str) -> bool:
        return address in self.tiers or address in self.shelves

    def _again(self, ref: SegmentRef) -> Held:
        """Computes what is in no place any more, unless another thread just has."""
        with self._computing:
            held = self.tiers.take(ref.address)
            if held is None:
                self.check_weights()
                self.counts.add("recomputed")
                (held,) = self._compute([ref])
        return held

    def _compute(self, refs: Sequence[SegmentRef]) -> list[Held]:
        segments = record(
            self.model, self.plan.stored("model"), [ref.ids for ref in refs], refs[0].prefix, keep=self.keep,
            addresses=[ref.address for ref in refs], page_size=self.page_size, impl=self.impl,
        )  # fmt: skip
        return [self._keep(segment.coarsened(self.coarse)) for segment in segments]

    def _keep(self, segment: Segment) -> Held:
        if self.shelves:
            self.shelves.write(self.tiers.host_copy(Held(segment)))
        return self.tiers.put(segment)

    def outline(self, ref: SegmentRef) -> Segment:
        """What the text's segment has to be, without data; layers and dtype are learnt from a text of one token."""
        with self._computing:
            if self._like is None:
                options = {"keep": self.keep, "page_size": self.page_size, "impl": self.impl}
                addresses, plan = [self.ref([0]).address], self.plan.stored("model")
                (self._like,) = record(self.model, plan, [[0]], addresses=addresses, **options)
        return outline(ref.address, ref.ids, ref.prefix, self._like.layers, self._like.dtype, self.coarse)

    def _read(self, wanted: Segment) -> Held | None:
        """Brings a text from a shelf to the device; `None` if none has a good one."""
        found = self.shelves.read(wanted, self.tiers.buffer)
        return None if found is None else self.tiers.read_in(*found)
