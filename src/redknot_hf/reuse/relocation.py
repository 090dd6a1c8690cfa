"""Moving stored keys to other positions: one rotation by the difference of two angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from redknot_kernels import Rotation, rotate
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument

Positions = Int[Tensor, " tokens"] | Int[Tensor, "batch tokens"]

# Error of a moved key against the model's own, relative to its norm. A wrong layout is off by about 1.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_TOLERANCE_IN_HALF = 3e-2
_PROBED = (3, 0, 4, 37, 171, 1009)
_FARTHEST = 131_072


@dataclass(frozen=True, eq=False)
class Turning:
    """How the keys of a layer turn with their position.

    Attributes:
        frequencies: Radians per token of each pair of dimensions, on the CPU.
        interleaved: Pairs are neighbouring dimensions, and not those of two halves.
        limit: Positions below it have these frequencies; `None` if all do.
        kind: The model's word for it: `"default"`, `"yarn"`, ...
    """

    frequencies: Float[Tensor, " pairs"]
    interleaved: bool
    limit: int | None
    kind: str

    def __repr__(self) -> str:
        layout = "interleaved" if self.interleaved else "halves"
        limit = "" if self.limit is None else f", positions below {self.limit:,}"
        return f"{self.kind} ({2 * len(self.frequencies)} dimensions, {layout}{limit})"


class Relocation:
    """Moves the keys that a model cached at some positions to where they would have been computed at others.

    Rotary embedding turns every pair `i` of a key's dimensions by `position * frequency[i]`, so a key moves by the
    difference of two angles; attention scaling (YaRN, longrope) is in the key already and stays. Angles are rounded to
    float32 as the model rounds them (at 128K that rounding is 4e-3 radians, and a moved key must have the same), then
    subtracted in float64.

    Source: RoFormer, arXiv 2104.09864, section 3.2; position-independent reuse of RedKnot, arXiv 2606.06256.

    Attributes:
        layers: Of each layer of the model's cache, how its keys turn; `None` where they do not (NoPE), or where it has
            none of its own.
    """

    def __init__(self, layers: tuple[Turning | None, ...]) -> None:
        self.layers = layers

    @classmethod
    def of(cls, model: PreTrainedModel) -> Relocation:
        """Finds out how the model turns its keys, and checks it on keys that the model computes.

        The model runs once, on a batch of single tokens: they attend to themselves alone, so in every layer the keys
        of one token differ by their position only. Each layer gets the one layout (halves or neighbours, whole or
        partial, the frequencies of one of the model's rotary modules, or none) that turns them into each other.

        Raises:
            ValueError: The model has no such layout, or its positions are no single number per token.
        """
        config = model.config.get_text_config(decoder=True)
        name = config.model_type
        if reason := _unmovable(config):
            raise _refused(name, reason)
        found = _rotary_modules(config, model)
        if not found:
            raise _refused(name, "it has no rotary module; its positions are learned embeddings, or biases (ALiBi)")
        limits = [turning.limit for turning in found if turning.limit is not None]
        probed = _probed_positions(min([*limits, getattr(config, "max_position_embeddings", None) or _FARTHEST]))
        keys = _computed_keys(model, config, probed)
        layers = tuple(None if k is None else _layout(name, i, k, found, probed) for i, k in enumerate(keys))
        if all(layer is None for layer in layers):
            raise _refused(name, "none turn with their position, which must enter by other means, such as ALiBi")
        return cls(layers)

    @property
    def limit(self) -> int | None:
        """The sequence length up to which the model's angles are those of `layers`; `None` if that is any."""
        return min((t.limit for t in self.layers if t is not None and t.limit is not None), default=None)

    def rotations(
        self, positions: Positions, targets: Positions, device: torch.device | str | None = None
    ) -> list[Rotation | None]:
        """For each layer, the turn that moves keys from `positions` to `targets`; `None` where keys stay.

        Layers that turn alike share one `Rotation`, for `redknot_kernels.rotate` and `place`.

        Args:
            positions, targets: Where each token was computed and where it shall stand, `[tokens]`, or for each
                sequence of a batch.
            device: Where the angles are computed and wanted; that of `positions` by default.

        Raises:
            ValueError: A position lies where the model's angles depend on the length of the sequence.
        """
        made: dict[int, Rotation] = {}
        for turning in self.layers:
            if turning is not None and id(turning) not in made:
                made[id(turning)] = _rotation(turning, positions, targets, device)
        return [None if turning is None else made[id(turning)] for turning in self.layers]

    def rerotate(
        self, keys: Float[Tensor, "*lead tokens dim"], layer: int, positions: Positions, targets: Positions
    ) -> Float[Tensor, "*lead tokens dim"]:
        """Moves keys of one layer from `positions` to `targets`; every key is rounded once.

        Move keys from where they were computed, once, and not hop by hop: each hop rounds.

        Raises:
            ValueError: A position lies where the model's angles depend on the length of the sequence.
        """
        turning = self.layers[layer]
        if turning is None:
            return keys
        return rotate(keys, _rotation(turning, positions, targets, keys.device))

    def __repr__(self) -> str:
        kinds = [repr(turning) if turning else "none" for turning in self.layers]
        return "Relocation(" + ", ".join(f"{kinds.count(k)} layers {k}" for k in dict.fromkeys(kinds)) + ")"


def _refused(name: str, reason: str) -> ValueError:
    return ValueError(f"{name}: the keys of this model cannot be moved: {reason}. Run its prompts without reuse.")


def _rotation(turning: Turning, positions: Positions, targets: Positions, device: Any) -> Rotation:
    limit = turning.limit
    if (
        limit is not None
        and targets.numel()
        and (farthest := max(int(p.max()) for p in (positions, targets))) >= limit
    ):
        raise ValueError(
            f"position {farthest} with {turning.kind} rotary embedding: from {limit:,} on its angles depend on the "
            "length of the whole sequence, so keys cannot be moved there. Keep the prompt shorter, or run it without "
            "reuse."
        )
    device = positions.device if device is None else torch.device(device)
    on = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    frequencies = turning.frequencies.to(on)
    there, here = ((where.to(on)[..., None].float() * frequencies).double() for where in (targets, positions))
    turn = there - here
    return Rotation(turn.cos().float().to(device), turn.sin().float().to(device), turning.interleaved)


def _unmovable(config: PreTrainedConfig) -> str | None:
    """Why the keys of such a model cannot be moved, as far as the config tells."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return f"it caches latents (MLA, kv_lora_rank={config.kv_lora_rank}) in place of keys"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose documents are no part of the decoder's sequence"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "its positions are biases of the scores (ALiBi), which follow a token's slot"
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        return "its positions are multimodal (mRoPE: time, height, width), and not one number per token"
    for i, layer in enumerate(DynamicCache(config=config).layers):
        none_of_its_own = type(layer).__name__ == "DummyLayer"  # older releases leave such layers out
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not none_of_its_own:
            return f"layer {i} keeps its past in a {type(layer).__name__}, which holds no keys of single tokens"
    return None


def _rotary_modules(config: PreTrainedConfig, model: nn.Module) -> list[Turning]:
    """Every set of frequencies in the model's rotary modules, in both layouts."""
    found: list[Turning] = []
    for module in model.modules():
        for name, value in list(vars(module).items()) + list(module._buffers.items()):
            if not name.endswith("inv_freq") or name.endswith(("original_inv_freq", "long_inv_freq")):
                continue
            if not isinstance(value, Tensor) or value.ndim != 1 or value.device.type == "meta":
                continue
            layer_type = name.removesuffix("inv_freq").rstrip("_")
            kinds, parameters = getattr(module, "rope_type", "default"), getattr(config, "rope_parameters", None) or {}
            kind = kinds.get(layer_type, "default") if isinstance(kinds, dict) else str(kinds)
            limit = _limit(kind, config, parameters.get(layer_type, parameters))
            if limit is not None:  # a longer sequence may have changed the others
                value = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq", value)
            frequencies = value.detach().float().cpu().clone()
            if not any(torch.equal(t.frequencies, frequencies) and t.limit == limit for t in found):
                found += [Turning(frequencies, interleaved, limit, kind) for interleaved in (False, True)]
    return found


def _limit(kind: str, config: PreTrainedConfig, parameters: dict[str, Any]) -> int | None:
    """Length from which on the angles depend on the length; see `dynamic_rope_update` in transformers."""
    if "dynamic" in kind:
        return config.max_position_embeddings - 1  # at the very length, a model that has seen longer ones differs
    if kind == "longrope":
        return parameters["original_max_position_embeddings"]
    return None


def _probed_positions(limit: int) -> Int[Tensor, " probed"]:
    """Positions to compute keys at: the first is moved to the others, of which the last is the farthest allowed."""
    near = [p for p in _PROBED if p < limit - 1]
    return torch.tensor([*near, min(limit, _FARTHEST) - 1])


@torch.no_grad()
def _computed_keys(
    model: Any, config: PreTrainedConfig, probed: Int[Tensor, " probed"]
) -> list[Float[Tensor, "tried probed heads dim"] | None]:
    """Keys that every layer caches for some tokens, each alone in its sequence, at each of the positions."""
    tried = torch.tensor([config.vocab_size // n for n in (2, 3, 5)])
    ids = tried.repeat_interleave(len(probed))[:, None].to(input_device(model))
    places = probed.repeat(len(tried))[:, None].to(input_device(model))
    cache, training = DynamicCache(config=config), model.training
    model.eval()
    try:
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=True,
            **cache_argument(model, cache),
        )  # fmt: skip
    finally:
        model.train(training)
    alone, layers = (len(tried), len(probed)), cast(list[Any], cache.layers)
    return [None if at.keys is None else at.keys[:, :, 0].unflatten(0, alone).cpu() for at in layers]


def _layout(
    name: str,
    layer: int,
    keys: Float[Tensor, "tried probed heads dim"],
    found: list[Turning],
    probed: Int[Tensor, " probed"],
) -> Turning | None:
    """The one layout that turns the keys of the first position into those of the others.

    Raises:
        ValueError: None does, or several do.
    """
    by_head = keys.transpose(1, 2)  # [tried, heads, probed, dim]
    source, wanted = by_head[:, :, :1].expand_as(by_head), by_head.double()
    tolerance = _TOLERANCE.get(keys.dtype, _TOLERANCE_IN_HALF)
    errors: dict[Turning | None, float] = {}
    for turning in (None, *found):
        moved = source
        if turning is not None:
            if 2 * len(turning.frequencies) > keys.shape[-1]:
                continue
            moved = rotate(source, _rotation(turning, probed[:1].expand_as(probed), probed, None))
        off = (moved.double() - wanted).norm(dim=(1, 3)) / wanted.norm(dim=(1, 3))
        errors[turning] = off.max().item()
    fits = [turning for turning, error in errors.items() if error <= tolerance]
    if len(fits) != 1:
        raise _refused(
            name,
            f"in layer {layer}, {len(fits)} of {len(errors)} known layouts of rotary embedding turn the keys of one "
            f"position into those that the model computes at others (best error {min(errors.values()):.2g} of their "
            f"norm, {tolerance:.0e} allowed), where one must",
        )
    return fits[0]
