"""One layer's tokens: the owner of their rows, of the pages these lie in, and of what kernels read of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from redknot_kernels import Context, HeadRules, Rotation, gather, read_context, scatter_tokens
from torch import Tensor

from .history import Slots
from .ledger import Ledger, Lengths
from .pool import staged
from .step import Group, Kept, Output, Query, Real, Step

Places = Int[np.ndarray, " kept"]


class Storage(Ledger):
    """The tokens of one layer. Nobody else writes its rows, their pages, or the mirror that kernels read.

    A step of up to a page is written first and attended where it lies: a ring is a page longer than its window (its
    slack), so what the step's first query sees is not overwritten. A longer step would overwrite it, so what its
    queries see of the past is read before it is written.

        short: reserve > write and attend > count      long: reserve > read the past > write > count, then attend
    """

    def reserve(self, lengths: Lengths) -> None:
        """Gives every row the pages to hold sequences of these lengths, pages of its own where it will write."""
        with self.pool.lock:
            self._ready(lengths)

    def append(self, step: Step, real: Real | None) -> None:
        """Writes a step's tokens to the rows; `real` says which are no padding. A second call changes nothing."""
        if step.written:
            return
        rules = self.rows.rules
        with self.pool.lock:
            lengths, slots = self._open(step, real)
            self._mirrored()
            for group in self.groups(step, real):
                key, value = group.take(step.key), group.take(step.value)
                table, counts = self._part(group)
                past = int(self.rows.lengths[group.sequences][0])
                if key.shape[2] > self.page_size and past:
                    group.context = self._context(group.sequences, past)
                cold = self.cold.tensors(group.sequences)
                if cold is not None and key.shape[2] <= self.page_size:  # what grows cold now, the step sees as it was
                    group.cold = cold._replace(counts=cold.counts.clone())
                self.kernels.append(self.pool.pages, key, value, table, counts, rules, cold)
                step.groups.append(group)
            self._count(lengths, slots)
            step.real, step.written = real, True
            self._mirrored()  # a captured step may be next

    def attend(self, step: Step, query: Query, real: Real | None, options: dict[str, Any]) -> Output:
        """Attends a step, and writes it first unless that has been done.

        Args:
            step: The new tokens; layers that share keys attend one step several times.
            query: Of the last tokens of the step, as a rule of all.
            real: Which tokens are no padding, `None` if all. What padding gets as output means nothing.
            options: `scale`, `softcap` and `s_aux`.
        """
        if not step.written and step.tokens <= self.page_size:
            return self._write_and_attend(step, query, real, options)
        self.append(step, real)
        step.groups = step.groups or self.groups(step, step.real)
        if len(step.groups) == 1 and step.groups[0].real is None:
            return self._attend_group(step, query, step.groups[0], options)
        batch, heads, tokens, _ = query.shape
        out = query.new_zeros(batch, tokens, heads, step.value.shape[-1])
        for group in step.groups:
            if group.real is None:
                out[group.sequences] = self._attend_group(step, query[group.sequences], group, options)
                continue
            asked = group.real[group.real >= step.tokens - tokens] - (step.tokens - tokens)
            if len(asked):
                mine = query[group.sequences].index_select(2, asked)
                out[group.sequences, asked] = self._attend_group(step, mine, group, options)
        return out

    def captured(self, step: Step, query: Query, mask: Tensor | None, options: dict[str, Any]) -> Output:
        """What `attend` does, inside of `torch.compile`: the device counts, and the host will ask it.

        What another layer has written already, of the same keys, is attended as it is.
        """
        run, mirror = self.kernels.captured, self.mirror
        assert run is not None
        new = (None, None) if step.written else (step.key, step.value)
        cold, stored = self.cold.tensors(), {}
        if cold is not None:
            pools = (*(cold.int8 or (None, None)), *(cold.int4 or (None, None)))
            stored = {"stored": (*pools, cold.table, cold.counts, [*self.rows.rules.storage], self.rows.rules.hot)}
        real = None if mask is None else mask[:, 0, 0]
        step.written = True
        return run(
            query, *self.pool.pages, *new, mirror.table, mirror.counts, real, mirror.bounds, mirror.most_kept,
            self.rows.rules.reach, options["scale"], options["softcap"], options["s_aux"], **stored,
        )  # fmt: skip

    def groups(self, step: Step, real: Real | None) -> list[Group]:
        """Which tokens of a step are attended together."""
        if real is None and (self.rows.level or step.tokens <= self.page_size):
            return [Group(slice(0, self.rows.batch), None)]
        indices = [None] * self.rows.batch if real is None else [r.nonzero()[:, 0] for r in real]
        return [Group(slice(b, b + 1), i) for b, i in enumerate(indices) if i is None or len(i)]

    def past(self, sequences: slice, length: int) -> list[Kept]:
        """What the rows of sequences of a length hold, kind by kind of head."""
        found = []
        with self.pool.lock:
            self._ready(self.rows.lengths)
            self._mirrored()
            table, rules, pages = self.mirror.table[sequences], self.rows.rules, self.pool.pages
            span = partial(torch.arange, device=table.device)
            if rules.global_heads:
                whole = table[:, list(rules.global_heads), : -(-length // self.page_size)]
                keys, values = (x[:, :, :length] for x in gather(pages, whole))
                found.append(Kept(rules.take(rules.global_heads), rules.global_heads, span(length), keys, values))
            context = self._context(sequences, length)
            for _, heads in rules.stored_groups:
                assert context.laid is not None
                laid, rows = context.laid
                keys, values = (x[:, :, :length] for x in gather(laid, rows[:, list(heads)]))
                found.append(Kept(rules.as_seen.take(heads), heads, span(length), keys, values))
        for (part, heads), band in zip(rules.local_groups, context.bands, strict=True):
            found.append(Kept.of_band(part, heads, length, *band))
        return found

    def place(
        self,
        sequence: int,
        keys: Float[Tensor, "kept key_dim"],
        values: Float[Tensor, "kept value_dim"],
        kept: tuple[tuple[int, ...], tuple[int, ...]],
        span: tuple[int, int, int],
        known: Sequence[tuple[int, Int[np.ndarray, " heads"]]],
        rotation: Rotation | None = None,
    ) -> None:
        """Continues one sequence with packed tokens: its rows take of them what their rules let them keep.

        `left_align` is to be called when all sequences are done.

        Args:
            sequence: Which one.
            keys, values, kept, span, rotation: As the kernel `place` takes them.
            known: The tokens by which the sequence grows, part by part: how many, and the position from which on each
                row knows all of them.
        """
        lengths = self.rows.lengths.copy()
        lengths[sequence] += sum(count for count, _ in known)
        with self.pool.lock:
            self._ready(lengths)
            self.mirror.refresh_table(self.rows, self.pool.pages.device)
            table = self.mirror.table[sequence]
            self.cold.refresh(self.pool.pages.device)
            cold = self.cold.tensors(slice(sequence, sequence + 1))
            self.kernels.place(self.pool.pages, keys, values, table, self.rows.rules, kept, span, rotation, cold)
            for count, since in known:
                self.rows.count_span(sequence, count, since)
            self.cold.advance(self.rows.lengths)

    def read(
        self, sequence: int, heads: Places, positions: Places
    ) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
        """Keys and values of tokens that the rows of one sequence hold."""
        with self.pool.lock:
            return self._read(sequence, heads, positions)

    def change_rules(self, rules: HeadRules) -> None:
        """Lets every head keep what other rules say, of what it holds: wider ones lose no more from now on.

        Rows whose rule changes move to new pages, so that forks keep theirs. A sink must not grow unless the rows
        still hold those tokens, or the model's own window hides them: zeros take their slots.
        """
        self.catch_up()
        with self.pool.lock:
            self._collect()
            self._ready(self.rows.lengths)
            old, lengths, moved = self.rows.rules, self.rows.lengths, []
            changed = [h for h in range(rules.heads) if _rule(old, h) != _rule(rules, h)]
            for b, h in ((b, h) for b in range(self.rows.batch) for h in changed):
                held = self.rows.positions_held(b, h)
                if not (bits := _rule(rules, h)[3]):
                    held = held[(held < rules.sink[h]) | (held >= lengths[b] - rules.ring[h])]
                elif _rule(old, h)[3] == bits:  # what is cold stays where it is
                    held = held[(held < self.page_size) | (held >= (self.cold.counts[b] + 1) * self.page_size)]
                kept = self._read(b, np.full(len(held), h), held)
                lost = np.setdiff1d(np.arange(min(rules.sink[h], lengths[b])), held)  # the model's window hides them
                pad = (0, 0, len(lost), 0)
                moved.append((b, h, np.concatenate([lost, held]), *(F.pad(x, pad) for x in kept)))
            self.rows.change_rules(rules, changed)
            self.cold.change_rules(rules, lengths, self.device)
            self.cold.under(self.pool.lock)
            self._ready(lengths)
            for b, h, held, keys, values in moved:
                if _rule(rules, h)[3] not in (0, _rule(old, h)[3]):
                    self.cold.write(b, h, keys, values)
                hot = np.flatnonzero((held < rules.sink[h]) | (held >= lengths[b] - rules.ring[h]))
                at, hot = (torch.from_numpy(x).to(self.device) for x in (held[hot], hot))
                slots = rules.take((h,)).slots(at[None, None])
                scatter_tokens(self.pool.pages, self._row(b, h), slots, keys[hot], values[hot])
            self._shrink(settled=True)
            self._settle()

    # The steps of the above; the lock is held

    def _open(self, step: Step, real: Real | None) -> tuple[Lengths, Slots]:
        """Makes room for a step; says how long sequences are with it, and which slots that adds."""
        counts = step.tokens if real is None else real.sum(1).cpu().numpy()
        lengths = self.rows.lengths + counts
        self._ready(lengths)
        return lengths, step.tokens if real is None else real

    def _ready(self, lengths: Lengths) -> None:
        """Brings the pages here, with room for sequences of these lengths that nobody else holds."""
        if self.pool.gone or self.cold.parts:
            self._collect()
        if self.pool.pages.keys.device != self.device:
            self.pool.to(self.device)
        room = self.rows.has_room(lengths)
        if self.cold.parts:
            self.cold.to(self.device)
            room = room and self.cold.has_room(lengths)
        if not room:
            self._make_room(lengths)

    def _read(
        self, sequence: int, heads: Places, positions: Places
    ) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
        rules, size, device = self.rows.rules, self.page_size, self.pool.pages.device
        sink, ring = (np.array(x)[heads] for x in (rules.sink, rules.ring))
        slots = np.where(positions < sink, positions, sink + (positions - sink) % ring)
        pages = self.rows.table[sequence, heads, slots // size].astype(np.int64)
        where = staged(pages * size + slots % size, device).to(device, non_blocking=True)
        keys, values = (x.view(-1, x.shape[-1]).index_select(0, where) for x in self.pool.pages)
        for which, *found in self.cold.read(sequence, heads, positions):
            at = staged(np.flatnonzero(which), device).to(device)
            for held, cold in zip((keys, values), found, strict=True):
                held.index_copy_(0, at, cold.to(held))
        return keys, values

    def _context(self, sequences: slice, length: int) -> Context:
        """The past of sequences of a length as a long step reads it."""
        table, cold = self.mirror.table[sequences], self.cold.tensors(sequences)
        return read_context(self.pool.pages, table, length, self.rows.rules, cold, self.kernels.lay_out)

    def _write_and_attend(self, step: Step, query: Query, real: Real | None, options: dict[str, Any]) -> Output:
        """Writes a step of at most a page and attends it, by one call of the kernels."""
        rows, pool, mirror, kernels = self.rows, self.pool, self.mirror, self.kernels
        with pool.lock:
            lengths, slots = self._open(step, real)
            views = None
            if kernels.step_in_views is not None and real is None and step.tokens == 1 and not self.cold.parts:
                views = mirror.views(rows, pool)
            if views is not None:
                past = int(rows.lengths[0])
                out = kernels.step_in_views(query, step.key, step.value, views, past, rows.rules, **options)  # pyright: ignore[reportOptionalCall]
            else:
                self._mirrored()
                out = kernels.step(
                    query, pool.pages, step.key, step.value, mirror.table, mirror.counts, real, rows.rules,
                    cold=self.cold.tensors(), **options,
                )  # fmt: skip
            self._count(lengths, slots)
            if views is None:
                mirror.advanced(rows, self.history.slots)
        step.real, step.written = real, True
        return out

    def _attend_group(self, step: Step, query: Query, group: Group, options: dict[str, Any]) -> Output:
        """Attends the last tokens of a group, which have been written: all, or those that a sharing layer wants."""
        rules, tokens = self.rows.rules, query.shape[2]
        if tokens > self.page_size:
            key, value = group.take(step.key), group.take(step.value)
            whole = F.pad(query, (0, 0, key.shape[2] - tokens, 0))
            return self.kernels.prefill(whole, key, value, group.context, rules, **options)[:, -tokens:]
        with self.pool.lock:
            self._mirrored()
            cold = group.cold or self.cold.tensors(group.sequences)
            return self.kernels.decode(query, self.pool.pages, *self._part(group), rules, cold=cold, **options)

    def _part(self, group: Group) -> tuple[Int[Tensor, "group heads columns"], Int[Tensor, " group"]]:
        return self.mirror.table[group.sequences], self.mirror.counts[:-1][group.sequences]

    def _row(self, sequence: int, head: int) -> Int[Tensor, "1 1 columns"]:
        table = np.maximum(self.rows.table[sequence : sequence + 1, head : head + 1], 0)
        return torch.from_numpy(table).to(self.pool.pages.device)


def _rule(rules: HeadRules, head: int) -> tuple[int, int, int, int]:
    """What one head keeps, and how."""
    return rules.window[head], rules.sink[head], rules.ring[head], rules.storage[head] if rules.storage else 0
