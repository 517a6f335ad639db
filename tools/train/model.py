"""The model that is trained: Hugging Face's BitNetForCausalLM, and what comes after it as options.

Squared ReLU, sub-norms, half-split RoPE, tied embeddings. Options: the kind of each linear's weights, the kind of each site's
activations, attention to a window and a few sinks with a memory beside it, and neurons of the feed-forward layer that are left out.
"""
import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from linear import BitLinear
from memory import Late, Matrices, Shared, Vector
from quantize import ACTIVATIONS, EPS

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SITES = ("attention", "output", "ffn", "down")


@dataclass
class Config:
    """A model. `window` is 0 for attention to everything."""

    vocab: int = 512
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 512
    theta: float = 10000.0
    window: int = 0
    sinks: int = 4
    memory: dict[str, int] = field(default_factory=dict)
    """Nothing; `heads`, and the `width` and height of each one's matrix; the `numbers` of a vector; or `shared`, attention's own."""
    delayed_writes: bool = False
    """Whether the memory is given a token when that leaves the window, and not at once."""
    memory_weights: str = "ternary"
    rho: float = 1.0
    weights: dict[str, str] = field(default_factory=dict)
    """By the name of a linear, `layers.2.mlp.up_proj` or `up_proj` in all layers; others are ternary."""
    activations: dict[str, str] = field(default_factory=dict)
    """By site; others are int8."""

    def kind(self, layer: int, name: str) -> str:
        return self.weights.get(f"layers.{layer}.{name}", self.weights.get(name, "ternary"))

    def activation(self, site: str):
        return ACTIVATIONS[self.activations.get(site, "int8")]

    def to_json(self) -> dict:
        return asdict(self)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the two halves of `x`, [.., time, head_dim], by `angles`, [time, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, window: int, sinks: int) -> Tensor:
    """Causal attention of [batch, heads, time, head_dim] before rotation; with a window, StreamingLLM's (arXiv 2309.17453).

    A query sees the first `sinks` positions and the last `window` after them, its own included. Positions count in that cache:
    once something has left the window the query is at `sinks + window - 1`, and no distance ever grows further.
    """
    time = q.shape[2]
    at = torch.arange(time, dtype=frequencies.dtype, device=q.device)
    qr, kr = (rotate(x, at[:, None] * frequencies) for x in (q, k))
    if window == 0 or time <= sinks + window:
        return F.scaled_dot_product_attention(qr, kr, v, is_causal=True)
    scale = 1 / math.sqrt(q.shape[-1])
    # Queries a window at a time see the sinks, the window before theirs, and their own.
    pad = -time % window
    chunks = lambda x: F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, window))
    before = lambda x: torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), 3)
    local = chunks(qr) @ before(chunks(kr)).mT * scale
    query = torch.arange(time + pad, device=q.device).unflatten(0, (-1, window))[:, :, None]
    key = torch.arange(-window, window, device=q.device)[None, None] + query[:, :1]
    local = local.masked_fill((key < sinks) | (key > query) | (key <= query - window), -math.inf)
    capped = at.clamp(max=sinks + window - 1)[:, None] * frequencies
    to_sinks = chunks(rotate(q, capped)) @ kr[:, :, None, :sinks].mT * scale
    to_sinks = to_sinks.masked_fill(torch.arange(sinks, device=q.device) > query, -math.inf)
    shares = torch.cat((to_sinks, local), -1).softmax(-1)
    out = shares[..., :sinks] @ v[:, :, None, :sinks] + shares[..., sinks:] @ before(chunks(v))
    return out.flatten(2, 3)[:, :, :time]


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, head_dim = c, c.hidden // c.heads
        make = lambda name, columns, rows: BitLinear(columns, rows, c.kind(layer, name))
        self.q_proj = make("q_proj", c.hidden, c.hidden)
        self.k_proj = make("k_proj", c.hidden, c.kv_heads * head_dim)
        self.v_proj = make("v_proj", c.hidden, c.kv_heads * head_dim)
        self.o_proj = make("o_proj", c.hidden, c.hidden)
        self.attn_sub_norm = RMSNorm(c.hidden)
        late = Late(c.window, c.sinks) if c.delayed_writes else None
        match c.memory:
            case {"heads": count, "width": width}:
                self.memory = Matrices(c.hidden, c.hidden, count, width, width, c.memory_weights, c.rho, late)
            case {"numbers": numbers}:
                self.memory = Vector(c.hidden, c.hidden, numbers, c.memory_weights, c.rho, late)
            case {"shared": _}:
                self.memory = Shared(c.hidden, c.hidden, c.kv_heads, head_dim, c.rho, late)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        c = self.c
        x = c.activation("attention")(x)
        heads = lambda y, n: y.unflatten(-1, (n, -1)).transpose(1, 2)
        q, k, v = heads(self.q_proj(x), c.heads), heads(self.k_proj(x), c.kv_heads), heads(self.v_proj(x), c.kv_heads)
        if c.memory:
            recalled = self.memory(x, q, k, v) if isinstance(self.memory, Shared) else self.memory(x)
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        y = attend(q, k, v, frequencies, c.window, c.sinks).transpose(1, 2).flatten(-2)
        if c.memory:
            y = y + recalled
        return self.o_proj(c.activation("output")(self.attn_sub_norm(y)))


class FeedForward(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c = c
        make = lambda name, columns, rows: BitLinear(columns, rows, c.kind(layer, name))
        self.gate_proj, self.up_proj = make("gate_proj", c.hidden, c.ffn), make("up_proj", c.hidden, c.ffn)
        self.down_proj = make("down_proj", c.ffn, c.hidden)
        self.ffn_sub_norm = RMSNorm(c.ffn)

    def keep(self, neurons: Tensor) -> None:
        """Leaves out all neurons but these. The sub-norm still divides by the width that it had."""
        self.gate_proj.live_rows = self.up_proj.live_rows = self.down_proj.live_columns = neurons

    def forward(self, x: Tensor) -> Tensor:
        x = self.c.activation("ffn")(x)
        h = F.relu(self.gate_proj(x)).square() * self.up_proj(x)
        return self.down_proj(self.c.activation("down")(self.ffn_sub_norm(h)))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), FeedForward(c, layer)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.hidden), RMSNorm(c.hidden)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), frequencies)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = RMSNorm(c.hidden)
        head_dim = c.hidden // c.heads
        frequencies = c.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, time, vocab] of ids [batch, time]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.frequencies)
        return self.norm(x) @ self.embed_tokens.weight.mT
