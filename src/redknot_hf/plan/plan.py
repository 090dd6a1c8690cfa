"""A head plan: what each KV head of a model keeps.

A global head keeps every token. A local head keeps the first `sink` tokens and the last `window`. The split is that
of RedKnot (arXiv 2606.06256). A plan is data: plain Python without tensors.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from . import formats
from .duo_attention import at_hand
from .formats import AnyPath, Rules
from .per_layer import kv_heads
from .picture import picture, shape
from .placement import Placement, balanced, dims_of, sources_of
from .published import Published, without_dtype
from .spec import HeadSpec
from .storage import HOT, PAGE_SIZE, itemsize

_log = logging.getLogger(__name__)


@dataclass(frozen=True, init=False)
class HeadPlan(Published):
    """The HeadSpec of every KV head of a model: `plan[layer][head]`.

    Plans are equal, and hash alike, when their heads are equal. Provenance plays no part in that.

    Args:
        heads: Layers of KV heads. Lists become tuples.
        provenance: How the plan came to be, as JSON can hold it. Copied.

    Raises:
        ValueError: The plan has no heads, or an entry is not a HeadSpec.
    """

    heads: tuple[tuple[HeadSpec, ...], ...]
    provenance: Mapping[str, Any] = field(compare=False)

    def __init__(self, heads: Iterable[Iterable[HeadSpec]], *, provenance: Mapping[str, Any] | None = None):
        object.__setattr__(self, "heads", tuple(map(tuple, heads)))
        object.__setattr__(self, "provenance", dict(provenance or {}))
        for spec in chain.from_iterable(self.heads):
            if not isinstance(spec, HeadSpec):
                raise ValueError(f"a head of the plan is {spec!r}: give a HeadSpec")
        if not self.num_heads:
            raise ValueError("the plan has no heads: give at least one layer with one KV head")

    @classmethod
    def uniform(cls, config: Any, spec: HeadSpec) -> "HeadPlan":
        """Give every KV head of the model with this transformers config the same spec."""
        return cls(tuple((spec,) * count for count in kv_heads(config)))

    @classmethod
    def with_global(cls, config: Any, global_heads: Iterable[tuple[int, int]], local: HeadSpec) -> "HeadPlan":
        """Make the (layer, KV head) pairs global and give the rest of the model the spec `local`.

        Raises:
            ValueError: A pair lies outside the model.
        """
        counts = kv_heads(config)
        chosen = {(index(layer), index(head)) for layer, head in global_heads}
        _check_inside(chosen, counts, "global head")
        spec = {True: HeadSpec(), False: local}
        return cls(tuple(tuple(spec[(i, h) in chosen] for h in range(n)) for i, n in enumerate(counts)))

    @classmethod
    def load(cls, path: AnyPath, config: Any = None) -> "HeadPlan":
        """Load a plan that `save` wrote, and check it against the config when one is given.

        A plan whose provenance names another model than the config does is loaded with a warning: heads of another
        model, even of the same shape, do other things.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or of another format, or the plan does not fit the config.
        """
        rules, provenance = formats.read_plan(path)
        plan = cls._from_rules(path, rules, provenance, config)
        if other := _made_for_another(provenance, config):
            warnings.warn(
                f"{path}: {other}. Make a plan of this model: redknot profile MODEL --out plan.json", stacklevel=2
            )
        return plan

    @classmethod
    def from_redknot(cls, path: AnyPath, config: Any = None) -> "HeadPlan":
        """Load a head-class JSON of RedKnot (arXiv 2606.06256).

        Global, retrieval and dense heads load as global, and so do all heads of the dense prefix layers. A local head
        has its own distance as window, else 512 tokens, and its own sink, else 4 tokens.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, of another format or of an MLA model, or does not fit the config.
        """
        provenance = {"source": "redknot", "file": Path(path).name}
        return cls._from_rules(path, formats.read_redknot(path), provenance, config)

    @classmethod
    def from_duo_attention(
        cls, path: AnyPath, *, global_ratio: float | None = None, threshold: float | None = None, config: Any = None
    ) -> "HeadPlan":
        """Load the scores of DuoAttention (arXiv 2410.10819): `from_duo_attention("Llama-3.1-8B-Instruct", ...)`.

        Local heads take `sink=sink_size` and `window=recent_size` from the `config.json` beside the scores.
        DuoAttention's recent_size counts the tokens it keeps; a window of as many includes the query's own.

        Args:
            path: `full_attention_heads.tsv` or the folder that holds it, here or at a URL that fsspec knows; or the
                name of a model whose scores its authors published.
            global_ratio: Share of the heads, 0 to 1, that are global: exactly `round(ratio * heads)`, those with the
                highest scores. The first of equal scores wins, layer by layer.
            threshold: A head is global when its score, clipped to [0, 1], is at least this.
            config: Checked against the plan when given.

        Raises:
            FileNotFoundError: The scores or `config.json` are missing.
            ValueError: Not exactly one of `global_ratio` and `threshold` is given, the ratio is outside 0 to 1, a
                file is damaged, or the plan does not fit the config.
        """
        with at_hand(path) as found:
            rules = formats.read_duo_attention(found, global_ratio, threshold)
        choice = {"threshold": threshold} if global_ratio is None else {"global_ratio": global_ratio}
        provenance = {"source": "duo-attention", "file": Path(path).name, **choice}
        return cls._from_rules(path, rules, provenance, config)

    @classmethod
    def _from_rules(cls, path: AnyPath, rules: Rules, provenance: Mapping[str, Any], config: Any) -> "HeadPlan":
        try:
            specs = (tuple(HeadSpec(*rule) for rule in layer) for layer in rules)  # pyright: ignore[reportArgumentType]
            plan = cls(tuple(specs), provenance=provenance)
            if config is not None:
                plan.check(config)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
        return plan

    def save(self, path: AnyPath) -> None:
        """Write the plan as small JSON: a default spec, the exceptions, the provenance. The file is replaced at once.

        Raises:
            ValueError: JSON cannot hold the provenance.
        """
        rules = tuple(tuple((spec.window, spec.sink, spec.storage) for spec in layer) for layer in self.heads)
        formats.write_plan(path, rules, self.provenance)

    def stored(self, storage: str, heads: Iterable[tuple[int, int]] | None = None) -> "HeadPlan":
        """The same plan with another storage of some global heads.

        Args:
            storage: `"model"`, `"int8"` or `"int4"`.
            heads: Which, as (layer, KV head); None for all global heads.

        Raises:
            ValueError: There is no such storage, a pair lies outside the plan, or a head is local.
        """
        if heads is None:
            chosen = {(i, h) for i, layer in enumerate(self) for h, spec in enumerate(layer) if spec.is_global}
        else:
            chosen = {(index(layer), index(head)) for layer, head in heads}
        counts = tuple(map(len, self.heads))
        _check_inside(chosen, counts, "head")
        specs = (
            (replace(spec, storage=storage) if (i, h) in chosen else spec for h, spec in enumerate(layer))
            for i, layer in enumerate(self)
        )
        return HeadPlan(specs, provenance=self.provenance)

    def check(self, config: Any) -> None:
        """Check that the plan fits the model with this transformers config.

        Raises:
            ValueError: The model has other layers or KV heads.
        """
        mine, theirs = tuple(map(len, self.heads)), kv_heads(config)
        if mine != theirs:
            names = [*(getattr(config, "architectures", None) or []), getattr(config, "model_type", None)]
            model = " / ".join(filter(None, names)) or type(config).__name__
            raise ValueError(
                f"the plan has {shape(mine)}, the model ({model}) has {shape(theirs)}: "
                "load the plan of this model, or make one with HeadPlan.with_global(model.config, ...)"
            )

    @property
    def num_heads(self) -> int:
        """KV heads over all layers."""
        return sum(map(len, self.heads))

    @property
    def num_global(self) -> int:
        """KV heads that keep every token."""
        return sum(spec.is_global for spec in chain.from_iterable(self.heads))

    def nbytes(
        self,
        length: int,
        head_dim: Any,
        dtype: Any,
        *,
        page_size: int = PAGE_SIZE,
        hot: int = HOT,
    ) -> int:
        """Return the bytes of K and V that ONE sequence of `length` tokens keeps, scales of cold pages included.

        Args:
            length: Tokens of the sequence.
            head_dim: Elements of a key and of a value, or the pair (key, value) where they differ; or the model's
                config, which says them for each layer, and which layers keep nothing since they share others' keys.
            dtype: A torch or numpy dtype, its name, or the bytes of an element.
            page_size, hot: Those of the cache; they count where heads have a storage of their own.

        Raises:
            ValueError: The dtype is unknown, or the length negative.
        """
        dims, sources, size = dims_of(self, head_dim), sources_of(self, head_dim), itemsize(dtype)
        counts = Counter((spec, dims[i]) for i, layer in enumerate(self) if sources[i] == i for spec in layer)
        return sum(n * spec.nbytes(length, *dim, size, page_size, hot) for (spec, dim), n in counts.items())

    def balanced(self, ranks: int, length: int, head_dim: Any = 128) -> Placement:
        """Return an order of the heads in which so many tensor-parallel ranks hold about as many bytes; see there.

        `length` is that of the sequences that are served, `head_dim` as `nbytes` takes it.
        """
        return balanced(self, ranks, length, head_dim)

    def __getitem__(self, layer: int) -> tuple[HeadSpec, ...]:
        return self.heads[layer]

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[tuple[HeadSpec, ...]]:
        return iter(self.heads)

    def __repr__(self) -> str:
        return f"HeadPlan({shape(tuple(map(len, self.heads)))}, {self.num_global} global)"

    def __str__(self) -> str:
        return picture(self)


def as_plan(plan: Any, config: Any) -> HeadPlan:
    """Return the plan, or that of the file, once it has been checked against the config.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither, or does not fit the config.
    """
    if isinstance(plan, str | PathLike):
        return HeadPlan.load(plan, config)
    if not isinstance(plan, HeadPlan):
        raise ValueError(f"plan is {plan!r:.80}: give a HeadPlan, or the file of one")
    plan.check(config)
    return plan


def _made_for_another(provenance: Mapping[str, Any], config: Any) -> str | None:
    """Say how the model of the provenance differs from that of the config, as far as both are known."""
    model, mine = provenance.get("model"), getattr(config, "name_or_path", None)
    # A model is at several paths, under several owners and in several dtypes: its last name stays.
    if model and mine and _bare_name(str(model)) != _bare_name(mine):
        return f"the plan was made for {model}, the model is {mine}"
    measured, dtype = provenance.get("dtype"), str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    if model and mine and measured and dtype and measured != dtype:
        _log.info("the plan was measured on %s in %s, and the model is in %s: the same heads", model, measured, dtype)
    revision, loaded = provenance.get("revision"), getattr(config, "_commit_hash", None)
    if model and revision and loaded and revision != loaded:
        return f"the plan was made for revision {revision} of {model}, the model is of revision {loaded}"
    return None


def _check_inside(chosen: Iterable[tuple[int, int]], counts: tuple[int, ...], name: str) -> None:
    for layer, head in sorted(chosen):
        if not (0 <= layer < len(counts) and 0 <= head < counts[layer]):
            where = f"({layer}, {head}) lies outside the model, which has {shape(counts)}"
            raise ValueError(f"{name} {where}: give (layer, KV head) pairs that count from 0")


def _bare_name(model: str) -> str:
    """The last part of a model's name, without the dtype that folders are often called by."""
    return without_dtype(Path(model).name.lower())
