"""The forward pass that trains the bundled model: a Llama's, dense or under a plan, fast at every length.

It computes what `LlamaForCausalLM` computes with the same parameters, and under a plan what `RedKnotCache` does; tests
hold it to both. Everything but attention works on a flat list of tokens, so that `torch.compile` sees one shape
whatever the length of the sequences, and one layer's code serves all layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from redknot_hf import HeadPlan


class Network:
    """Runs the parameters of a Llama; they stay the model's own.

    Args:
        model: Its parameters are used in place.
        plan: Which KV heads see everything; all others share one window and one sink.
        dtype: What matrices are multiplied in. The residual stream, norms and the loss are in the parameters' dtype.
        compiled: Compiles all but attention, for the number of tokens of the first call.

    Raises:
        ValueError: The plan has several windows, or a sink larger than the window.
    """

    def __init__(self, model: LlamaForCausalLM, plan: HeadPlan, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.dtype, self.compiled = model, dtype, compiled
        config = model.config
        self.head_dim = config.head_dim
        local = {spec for layer in plan.heads for spec in layer if not spec.is_global}
        if len(local) > 1 or any(spec.window is None or spec.sink > spec.window for spec in local):
            raise ValueError(f"the plan's local heads are {sorted(map(str, local))}: give all one window >= its sink")
        spec = next(iter(local), None)
        self.window, self.sink = (None, 0) if spec is None else (spec.window, spec.sink)
        device = next(model.parameters()).device
        self.heads = [
            [torch.tensor([h for h, spec in enumerate(layer) if spec.is_global is wanted], device=device)
             for wanted in (True, False)]
            for layer in plan.heads
        ]  # fmt: skip
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._fast = {f: torch.compile(f, dynamic=False) if compiled else f for f in (_before, _after, _loss)}

    def hidden(self, ids: Tensor, planned: bool, compiled: bool | None = None) -> Tensor:
        """Return the last layer's output `[rows * length, hidden]`, before the final norm, of ids `[rows, length]`.

        Args:
            ids: Token ids.
            planned: Restrict the local heads to their window and sinks.
            compiled: Overrides what the network was made with, for other numbers of tokens.

        Raises:
            ValueError: The length is longer than the window and no multiple of it, and `planned` is set.
        """
        rows, length = ids.shape
        before, after = self._call(_before, compiled), self._call(_after, compiled)
        angles = self._rotation(rows, length, ids.device)
        x = self.model.model.embed_tokens(ids.reshape(-1))
        layers: list[Any] = list(self.model.model.layers)
        for layer, heads in zip(layers, self.heads, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            eps = layer.input_layernorm.variance_epsilon
            q, k, v = (
                y.view(rows, length, -1, self.head_dim).transpose(1, 2)
                for y in before(x, layer.input_layernorm.weight, projections, angles, eps, self.dtype)
            )
            out = self._planned(q, k, v, heads) if planned else _causal(q, k, v)
            out = out.transpose(1, 2).reshape(rows * length, -1)
            matrices = (
                attention.o_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            )  # fmt: skip
            x = after(x, out, layer.post_attention_layernorm.weight, matrices, eps, self.dtype)
        return x

    def logits(self, ids: Tensor, planned: bool, compiled: bool | None = None) -> Tensor:
        """Return the logits `[rows, length, words]` of ids `[rows, length]`."""
        x = self.hidden(ids, planned, compiled)
        norm = self.model.model.norm
        return _words(x, norm.weight, self._embedding(), norm.variance_epsilon, self.dtype).view(*ids.shape, -1)

    def loss(self, ids: Tensor, weights: Tensor, planned: bool) -> Tensor:
        """Return the mean loss of predicting each token from those before it, weighted by `weights [rows, length]`."""
        x = self.hidden(ids, planned)
        targets = F.pad(ids[:, 1:], (0, 1)).reshape(-1)
        shifted = F.pad(weights[:, 1:], (0, 1)).reshape(-1)
        norm = self.model.model.norm
        return self._call(_loss)(
            x, norm.weight, self._embedding(), targets, shifted, norm.variance_epsilon, self.dtype
        )  # fmt: skip

    def _embedding(self) -> Tensor:
        return self.model.lm_head.weight

    def _call(self, function: Callable[..., Any], compiled: bool | None = None) -> Callable[..., Any]:
        return function if compiled is False else self._fast[function]

    def _rotation(self, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[rows * length, 1, head_dim]` of the positions, computed once a shape."""
        if (rows, length) not in self._angles:
            positions = torch.arange(length, device=device)[None]
            like = torch.empty((), dtype=torch.float32, device=device)
            cos, sin = self.model.model.rotary_emb(like, positions)
            self._angles[rows, length] = (_tile(cos[0], rows), _tile(sin[0], rows))
        return self._angles[rows, length]

    def _planned(self, q: Tensor, k: Tensor, v: Tensor, heads: list[Tensor]) -> Tensor:
        """Attend with the global heads to everything, with the others to the sinks and the window."""
        length = q.shape[2]
        if self.window is None or length <= self.window:
            return _causal(q, k, v)
        if length % self.window:
            raise ValueError(f"the length is {length}: give a multiple of the window of {self.window}")
        whole, near = heads
        group = q.shape[1] // k.shape[1]
        out = torch.empty_like(q)
        for chosen, attend in ((whole, _causal), (near, self._banded)):
            if len(chosen):
                queries = (chosen[:, None] * group + torch.arange(group, device=q.device)).flatten()
                part = attend(*(x.index_select(1, at) for x, at in ((q, queries), (k, chosen), (v, chosen))))
                out = out.index_copy(1, queries, part)
        return out

    def _banded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in blocks of one window: each sees the sinks, the block before and itself, as the mask allows."""
        rows, heads, length, dim = q.shape
        assert self.window is not None
        blocks = length // self.window
        queries = q.reshape(rows, heads, blocks, self.window, dim).transpose(1, 2).flatten(0, 1)
        keys, values = (self._band(x).transpose(1, 2).flatten(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
        mask = self._mask(rows, blocks, q).expand(-1, heads, -1, -1)
        with _backend(SDPBackend.EFFICIENT_ATTENTION, q):
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return out.view(rows, blocks, heads, self.window, dim).transpose(1, 2).reshape(rows, heads, length, dim)

    def _band(self, x: Tensor) -> Tensor:
        """Return what each block can see of keys or values: `[rows, heads, blocks, slots + 2 * window, dim]`."""
        rows, heads, length, dim = x.shape
        assert self.window is not None
        own = x.view(rows, heads, length // self.window, self.window, dim)
        past = F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        sinks = F.pad(x[:, :, : self.sink], (0, 0, 0, _slots(self.sink) - self.sink))
        return torch.cat([sinks[:, :, None].expand(-1, -1, own.shape[2], -1, -1), past, own], 3)

    def _mask(self, rows: int, blocks: int, like: Tensor) -> Tensor:
        """Return 0 where a key is visible, else -inf, `[rows * blocks, 1, window, slots + 2 * window]`.

        It is computed once a shape. A mask of bool would be turned into numbers for every head anew.
        """
        if (rows, blocks) not in self._masks:
            assert self.window is not None
            device = like.device
            queries = torch.arange(blocks * self.window, device=device).view(blocks, self.window, 1)
            first = torch.arange(blocks, device=device).view(-1, 1, 1) * self.window - self.window
            keys = first + torch.arange(2 * self.window, device=device)
            band = (keys >= 0) & (keys <= queries) & (keys > queries - self.window)
            slots = torch.arange(_slots(self.sink), device=device)
            sinks = (slots < self.sink) & (slots <= queries - self.window)
            hidden = ~torch.cat([sinks, band], 2)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=device).masked_fill_(hidden, float("-inf"))
            self._masks[rows, blocks] = mask.repeat(rows, 1, 1)[:, None]
        return self._masks[rows, blocks]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with _backend(SDPBackend.FLASH_ATTENTION, q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _backend(backend: SDPBackend, x: Tensor) -> Any:
    """Insist on a GPU's fast kernel, which takes half precision; on a CPU torch chooses."""
    half = x.is_cuda and x.dtype != torch.float32
    return sdpa_kernel([backend] if half else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


def _slots(sink: int) -> int:
    """Return places for the sinks, a multiple of 8, which the masks of GPU kernels must be aligned to."""
    return -(-sink // 8) * 8


def _tile(x: Tensor, rows: int) -> Tensor:
    return x.repeat(rows, 1)[:, None].contiguous()


def _before(
    x: Tensor, norm: Tensor, projections: tuple[Tensor, ...], angles: tuple[Tensor, Tensor], eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return queries, keys and values `[tokens, heads, head_dim]` of the residual stream `[tokens, hidden]`."""
    cos, sin = angles
    y = _normed(x, norm, eps).to(dtype)
    q, k, v = (F.linear(y, w.to(dtype)).view(len(x), -1, cos.shape[-1]) for w in projections)
    return *((z * cos + _half_turned(z) * sin).to(dtype) for z in (q, k)), v


def _after(
    x: Tensor, attended: Tensor, norm: Tensor, matrices: tuple[Tensor, ...], eps: float, dtype: torch.dtype
) -> Tensor:
    """Add the attention's output and then the MLP's to the residual stream `[tokens, hidden]`."""
    out, gate, up, down = (w.to(dtype) for w in matrices)
    x = x + F.linear(attended, out)
    y = _normed(x, norm, eps).to(dtype)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def _loss(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    losses = F.cross_entropy(_words(x, norm, embedding, eps, dtype).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def _words(x: Tensor, norm: Tensor, embedding: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.linear(_normed(x, norm, eps).to(dtype), embedding.to(dtype))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _half_turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)
