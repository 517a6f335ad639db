"""BitRNN-M: the past in a matrix of fixed size, by a gated delta rule (Gated DeltaNet, arXiv 2412.06464) with 1-bit projections.

Per head `S = alpha (I - beta k kᵀ) S + beta k vᵀ`, read by `o = Sᵀ q`; `|k| = |q| = 1`, `0 < alpha, beta < 1`. Projections read the
int8 vector that attention's queries, keys and values read; gates, taps, norm and state are f32. :func:`by_token` is the
definition, which the runtime computes; :func:`by_chunk` is equal but for rounding, and what is trained with.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from linear import BitLinear
from quantize import int8

HALF_LIVES = (64, 512, 4096, 32768)
"""Tokens after which a head has forgotten half, before training; heads take them in turn."""
CHUNK = 64


def by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """`o` of shape [batch, heads, time, dv]; q and k are [.., dk], v is [.., dv], g (the logarithm of alpha) and beta have none."""
    batch, heads, time, _ = q.shape
    state = q.new_zeros(batch, heads, v.shape[-1], k.shape[-1])
    out = []
    for t in range(time):
        state = state * g[:, :, t, None, None].exp()
        kept = (state * k[:, :, t, None, :]).sum(-1)
        error = beta[:, :, t, None] * (v[:, :, t] - kept)
        state = state + error[..., None] * k[:, :, t, None, :]
        out.append((state * q[:, :, t, None, :]).sum(-1))
    return torch.stack(out, 2)


def by_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """:func:`by_token`, `CHUNK` tokens at a time."""
    time = q.shape[2]
    pad = -time % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, pad)).unflatten(2, (-1, CHUNK)) for x in (g, beta))
    decay = g.cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -math.inf).exp()
    lower = (beta[..., None] * between * (k @ k.mT)).tril(-1)
    identity = torch.eye(CHUNK)
    inverse = torch.linalg.solve_triangular(identity + lower, identity.expand_as(lower), upper=False, unitriangular=True)
    written = inverse @ (beta[..., None] * v)
    erased = inverse @ ((beta * decay.exp())[..., None] * k)
    scores = between * (q @ k.mT)
    fading = decay.exp()[..., None] * q
    kept = (decay[..., -1:] - decay).exp()[..., None] * k
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    out = []
    for c in range(q.shape[2]):
        update = written[:, :, c] - erased[:, :, c] @ state
        out.append(fading[:, :, c] @ state + scores[:, :, c] @ update)
        state = decay[:, :, c, -1, None, None].exp() * state + kept[:, :, c].mT @ update
    return torch.stack(out, 2).flatten(2, 3)[:, :, :time]


class Memory(nn.Module):
    """A cell of `heads` states of [value, key] that adds `rho · o_proj(m)` to the results of attention.

    `in_proj` has the rows of all queries, keys, values and output gates, in this order; `gate_proj` those of alpha, then beta.
    `rho` is 0 where a trained model gets a cell, so that it computes what it did, and 1 in a model trained with it.
    """

    def __init__(self, hidden: int, width: int, heads: int, key: int, value: int, kind: str, rho: float):
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        keys, values = heads * key, heads * value
        self.in_proj = BitLinear(hidden, 2 * keys + 2 * values, kind)
        self.gate_proj = BitLinear(hidden, 2 * heads, "ternary")
        self.o_proj = BitLinear(values, width, "ternary")
        # A key is what its predecessor was, its value what comes now: "key value" binds without help from attention.
        taps = torch.zeros(2 * keys + values, 4)
        taps[:, 3], taps[keys : 2 * keys] = 1.0, torch.tensor([0.0, 0.0, 1.0, 0.0])
        self.taps = nn.Parameter(taps + 0.05 * torch.randn(taps.shape))
        half_lives = torch.tensor([HALF_LIVES[h % len(HALF_LIVES)] for h in range(heads)], dtype=torch.float64)
        self.log_rate = nn.Parameter(torch.zeros(heads))
        self.decay_bias = nn.Parameter(torch.expm1(math.log(2) / half_lives).log().float())
        self.write_bias = nn.Parameter(torch.zeros(heads))
        self.norm = nn.Parameter(torch.ones(value))
        self.rho = nn.Parameter(torch.full((width,), rho))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to attention's results, of which `x`, [batch, time, hidden], is the quantized input."""
        keys, values = self.heads * self.key, self.heads * self.value
        taken, gate = self.in_proj(x).split((2 * keys + values, values), -1)
        past = F.pad(taken.mT, (3, 0))
        taken = F.silu(F.conv1d(past, self.taps[:, None], groups=len(self.taps)).mT)
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = map(heads, taken.split((keys, keys, values), -1))
        unit = lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
        a, b = self.gate_proj(x).transpose(1, 2).split(self.heads, 1)
        g = -self.log_rate.exp()[:, None] * F.softplus(a + self.decay_bias[:, None])
        beta = torch.sigmoid(b + self.write_bias[:, None])
        o = by_chunk(unit(q), unit(k), v, g, beta).transpose(1, 2)
        m = F.rms_norm(o, (self.value,), self.norm, 1e-5) * F.silu(gate.unflatten(-1, (self.heads, -1)))
        return self.rho * self.o_proj(int8(m.flatten(-2)))
