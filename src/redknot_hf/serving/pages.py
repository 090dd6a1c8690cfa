"""Pages by number: what rows of a sequence need, lack and are worth in bytes, in hot and cold pools alike."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from redknot_hf.cache.ledger import Held
from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.rows import Lacking
from redknot_hf.cache.storage import Storage


def needed(held: Held) -> int:
    """Pages that rows have when they have come to their lengths."""
    return int(held.rows.pages_needed(held.lengths).sum())


def missing(held: Held) -> int:
    """Pages that rows of one sequence lack, copies of those that others list too included."""
    rows, references = held.rows, held.pool.references
    lacking = rows.pages_missing(held.lengths)
    if not references.shared or rows.has_room(held.lengths):
        return lacking
    table, size = rows.table[0], rows.rules.page_size
    first = np.zeros(rows.rules.heads, np.int64)
    first[list(rows.rules.global_heads)] = int(rows.lengths[0]) // size
    written = (np.arange(table.shape[1]) >= first[:, None]) & (table >= 0)
    return lacking + int((references.counts[table[written]] > 1).sum())


def reserve(storages: Iterable[Storage], tokens: int) -> None:
    """Gives the rows of one sequence pages of their own for so many tokens, in layers of equal rules.

    Their rows hold as many pages, so that what one lacks, all do.
    """
    lacking: dict[int, Lacking] = {}
    for storage in storages:
        with storage.pool.lock:
            for i, (rows, pool, lengths) in enumerate(storage.held(tokens)):
                pool.collect()
                if not rows.owned:
                    pool.make_room(rows, lengths)
                    continue
                if i not in lacking:
                    lacking[i] = rows.lacking(lengths)
                rows.take(lacking[i], pool.allocate)


def page_bytes(pool: PagePool) -> int:
    """Bytes of one page."""
    return sum(part.new_empty(1, *part.shape[1:]).nbytes for part in pool.pages)


def ring_bytes(storages: Iterable[Storage]) -> int:
    """Bytes of the rows of one sequence that do not grow for ever, and of the hot ends of those that are stored."""
    return sum(page_bytes(x.pool) * ring_pages(x) for x in storages)


def ring_pages(storage: Storage) -> int:
    """The same in pages of one layer."""
    rules = storage.rows.rules
    return sum(rules.max_pages[h] for h in range(rules.heads) if h not in rules.global_heads)


def column_bytes(storages: Iterable[Storage]) -> int:
    """Bytes of one page of every row that grows for ever, cold ones in the storage of their head."""
    return sum(page_bytes(x.pool) * len(x.rows.rules.global_heads) for s in storages for x in s.held(0))
