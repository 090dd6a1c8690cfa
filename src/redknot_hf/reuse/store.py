"""The store of segments: texts are prefilled once, and their keys and values are had again from memory or disk."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, get_args

from redknot_hf.attention.devices import input_device
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadPlan, as_plan

from .files import SegmentFileError, SegmentFolder, outline
from .gate import Verdict, gate
from .identity import model_identity, segment_address, weights_state
from .ids import Ids, as_ids
from .recording import Keep, record
from .segment import Segment, SegmentRef
from .stand_in import StandIn
from .tiers import Counts, Held, Tiers

GIB = 2**30
# Tokens, padding included, that are prefilled in one batch.
_BATCH_TOKENS = 8192


class SegmentStore:
    """Keys and values of texts, for one model and plan.

    `add` prefills a text once; `redknot_hf.assemble` builds caches of what was added. Segments lie on the device, in
    pinned memory of the host, and in files; the one that was not used for longest makes room. What has left memory and
    is in no file is computed anew when it is asked for. Any thread may use a store; forward passes take turns.

    Source: RedKnot, arXiv 2606.06256 (position-independent reuse); the per-head part of it is ours.

    Args:
        model: A causal LM with `attn_implementation="redknot"`.
        plan: What every KV head sees and keeps, or the file of a plan.
        device_bytes, host_bytes: Most bytes in the memory of the device and of the host; `None` is no bound.
        path: A folder, or a URL that fsspec knows, which every segment is written to as well. Other processes may use
            the same.
        keep: `"plan"` keeps what the plan lets a later context need; `"full"` all tokens of all heads, for `refresh`.
        identity: Name of the model and its weights, where hashing them is not wanted or not possible.
        stand_in: What comes between the prefix of a text and the text while it is prefilled, in the place of what will
            stand there when it is reused; token ids, or a `StandIn` made of documents.
        page_size, impl: Of the caches that texts are prefilled with.

    Raises:
        ValueError: The plan does not fit the model, the model cannot be served, or an argument is off.
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        model: Any,
        plan: HeadPlan | AnyPath,
        *,
        device_bytes: int | None = GIB,
        host_bytes: int | None = 8 * GIB,
        path: str | os.PathLike[str] | None = None,
        keep: str = "plan",
        identity: str | None = None,
        stand_in: StandIn | Ids | None = None,
        page_size: int = 64,
        impl: str | None = None,
    ) -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"keep={keep!r}: choose one of {get_args(Keep)}")
        self.model, self.plan = model, as_plan(plan, model.config)
        self.keep: Keep = keep  # pyright: ignore[reportAttributeAccessIssue]
        self.page_size, self.impl = page_size, impl
        self.stand_in = StandIn.taken(stand_in)
        self._name = identity
        self.identity, self._weights = self._identity(), weights_state(model)
        self.folder = None if path is None else SegmentFolder(path, self.identity)
        self._on_disk: set[str] = set()
        self._named: dict[str, SegmentRef] = {}
        self.tiers = Tiers(input_device(model), device_bytes, host_bytes, self._on_disk.__contains__)
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
            for batch in _batches(sorted(absent.values(), key=lambda ref: (ref.prefix, len(ref)))):
                self.tiers.count("computed", len(batch))
                self._compute(batch)
        return refs

    def ref(self, ids: Ids, prefix: Ids | SegmentRef | None = None, *, stand_in: bool = True) -> SegmentRef:
        """Names a text without computing anything; what is not in the store then is when it is first used."""
        known = isinstance(prefix, SegmentRef)
        behind = (*prefix.prefix, *prefix.ids) if known else as_ids(() if prefix is None else prefix)
        tokens = as_ids(ids)
        if not tokens:
            raise ValueError("the text has no tokens: leave it out")
        if behind and stand_in:
            behind += self.stand_in.before(tokens)
        return SegmentRef(segment_address(self.identity, self.plan, self.keep, tokens, behind), tokens, behind, self)

    def named(self, address: str) -> SegmentRef:
        """The text of this address: one that was added here, or that lies among the files.

        Raises:
            ValueError: There is none.
        """
        found = self._named.get(address)
        if found is None and self.folder is not None and (said := self.folder.text_of(address)) is not None:
            found = self.ref(*said, stand_in=False)
        if found is None or found.address != address:
            raise ValueError(f"there is no segment {address!r:.80}: add its text to the store, which says its address")
        return found

    def get(self, ref: SegmentRef) -> Segment:
        """The stored keys and values of a text, on the device; computed anew if the store has lost them."""
        held = self.tiers.take(ref.address) or self._from_file(ref) or self._again(ref)
        return held.here()

    def fetch(self, refs: Sequence[SegmentRef]) -> list[Held]:
        """Brings the keys and values of several texts to the device, as `get` does; copies may still be under way."""
        held = [self.tiers.take(ref.address) for ref in refs]
        reading: dict[int, Future[Held | None]] = {}
        if self.folder is not None:
            absent = [i for i, one in enumerate(held) if one is None]
            reading = {i: self._readers.submit(self._read, self._outline(refs[i])) for i in absent}
        for i, future in reading.items():
            held[i] = future.result()
        return [one or self._again(ref) for one, ref in zip(held, refs, strict=True)]

    def drop(self, ref: SegmentRef) -> None:
        """Forgets a text, in memory and on disk."""
        self.tiers.drop(ref.address)
        self._on_disk.discard(ref.address)
        self._named.pop(ref.address, None)
        if self.folder is not None:
            self.folder.remove(ref.address)

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
    def counts(self) -> Counts:
        """What the store has done so far."""
        return self.tiers.counts

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held in memory, by tier."""
        return self.tiers.nbytes

    def __contains__(self, ref: SegmentRef) -> bool:
        return self._has(ref.address)

    def __repr__(self) -> str:
        held = ", ".join(f"{n / 2**20:.1f} MiB on {name}" for name, n in self.nbytes.items())
        texts = len(self.tiers)
        if self.folder is not None:
            files, nbytes = self.folder.held()
            held += f", {files} file{'s' * (files != 1)} of {nbytes / 2**20:.1f} MiB in {self.folder.url}"
        return f"SegmentStore({texts} text{'s' * (texts != 1)} in memory, {held}; {self.counts})"

    def _identity(self) -> str:
        return model_identity(self.model) if self._name is None else self._name

    def _has(self, address: str) -> bool:
        if address in self.tiers or address in self._on_disk:
            return True
        if self.folder is not None and address in self.folder:
            self._on_disk.add(address)
            return True
        return False

    def _again(self, ref: SegmentRef) -> Held:
        """Computes what is in no place any more, unless another thread just has."""
        with self._computing:
            held = self.tiers.take(ref.address)
            if held is None:
                self.check_weights()
                self.tiers.count("recomputed")
                (held,) = self._compute([ref])
        return held

    def _compute(self, refs: Sequence[SegmentRef]) -> list[Held]:
        segments = record(
            self.model, self.plan, [ref.ids for ref in refs], refs[0].prefix, keep=self.keep,
            addresses=[ref.address for ref in refs], page_size=self.page_size, impl=self.impl,
        )  # fmt: skip
        return [self._keep(segment) for segment in segments]

    def _keep(self, segment: Segment) -> Held:
        held = Held(segment)
        if self.folder is not None:
            try:
                self.folder.write(self.tiers.host_copy(held))
                self._on_disk.add(segment.address)
            except OSError as e:
                self.tiers.count("failed_writes")
                _warn(f"segment {segment.address[:8]} is kept in memory only: {e}")
        return self.tiers.put(segment)

    def _outline(self, ref: SegmentRef) -> Segment:
        """What the text's segment has to be, without data; layers and dtype are learnt from a text of one token."""
        with self._computing:
            if self._like is None:
                options = {"keep": self.keep, "page_size": self.page_size, "impl": self.impl}
                (self._like,) = record(self.model, self.plan, [[0]], addresses=[self.ref([0]).address], **options)
        return outline(ref.address, ref.ids, ref.prefix, self._like.layers, self._like.data.dtype)

    def _from_file(self, ref: SegmentRef) -> Held | None:
        return None if self.folder is None else self._read(self._outline(ref))

    def _read(self, wanted: Segment) -> Held | None:
        """Brings a text from its file to the device; `None` if there is no good file."""
        assert self.folder is not None
        try:
            segment = self.folder.read(wanted, self.tiers.buffer)
        except FileNotFoundError:
            self._on_disk.discard(wanted.address)
            return None
        except (SegmentFileError, OSError) as e:
            self.tiers.count("damaged")
            self._on_disk.discard(wanted.address)
            _warn(f"a stored segment is computed anew: {e}")
            return None
        self._on_disk.add(wanted.address)
        return self.tiers.read_in(segment)


def _batches(refs: Sequence[SegmentRef]) -> Iterator[list[SegmentRef]]:
    """Texts by prefix, in order of length, so many together that a batch has at most so many tokens with padding."""
    batch: list[SegmentRef] = []
    for ref in refs:
        if batch and (ref.prefix != batch[0].prefix or (len(batch) + 1) * len(ref) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(ref)
    if batch:
        yield batch


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
