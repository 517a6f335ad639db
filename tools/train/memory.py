"""What remembers beside attention, in a state of fixed size, with 1-bit projections.

BitRNN-M, matrices by a gated delta rule (Gated DeltaNet, arXiv 2412.06464): per head `S = alpha (I - beta k kᵀ) S + beta k vᵀ`, read
by `o = Sᵀ q`; `|k| = |q| = 1`, `0 < alpha, beta < 1`. BitRNN-V, a vector by a gated recurrence (HGRN, arXiv 2311.04823):
`h = f h + (1 - f) c`, number by number; it holds far less. Projections read the int8 vector that attention's queries, keys and
values read; or the matrices take these queries, keys and values themselves. Gates, taps, norm and state are f32. What goes token by token is the definition, which the runtime computes;
:func:`by_chunk` and :func:`by_scan` are equal but for rounding, and what is trained with.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from linear import BitLinear
from quantize import int8

HALF_LIVES = (64, 512, 4096, 32768)
"""Tokens after which a head has forgotten half, before training; heads take them in turn."""
FORGET_BIAS = (1, 6)
"""Of a vector's first and last number, before training; those between are in equal steps."""
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
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -math.inf).exp()
    lower = (beta[..., None] * between * (k @ k.mT)).tril(-1)
    identity = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
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


def number_by_token(f: Tensor, c: Tensor) -> Tensor:
    """`h = f h + (1 - f) c` along the second to last dimension, from zero on."""
    state, out = torch.zeros_like(c[..., 0, :]), []
    for t in range(c.shape[-2]):
        state = f[..., t, :] * state + (1 - f[..., t, :]) * c[..., t, :]
        out.append(state)
    return torch.stack(out, -2)


def by_scan(f: Tensor, c: Tensor) -> Tensor:
    """:func:`number_by_token`, in as many steps as the logarithm of the time."""
    time, x, far = c.shape[-2], (1 - f) * c, 1
    while far < time:
        before = lambda y, start: F.pad(y, (0, 0, far, 0), value=start)[..., :time, :]
        x, f = f * before(x, 0.0) + x, f * before(f, 1.0)
        far *= 2
    return x


def mix(x: Tensor, taps: Tensor) -> Tensor:
    """A convolution of each channel of `x`, [batch, time, channels], over its last four tokens; `taps` are [channels, 4]."""
    return F.conv1d(F.pad(x.mT, (3, 0)), taps[:, None], groups=len(taps)).mT


def bounded(least: Tensor) -> Tensor:
    """The least that a vector keeps, within what it may be."""
    return least.clamp(0, 0.999)


@dataclass
class Late:
    """What a memory is given when it leaves a window: nothing at first, and never the `sinks`."""

    window: int
    sinks: int

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, [.., time, channels], later, with zeros for what is not given."""
        return F.pad(x[..., self.sinks :, :], (0, 0, self.sinks + self.window, 0))[..., : x.shape[-2], :]


class ByKey(nn.Module):
    """What cells of matrices have in common: `gate_proj`, which has the rows of alpha, then beta, and what these become."""

    def set_decay(self, heads: int, late: Late | None) -> None:
        half_lives = torch.tensor([HALF_LIVES[h % len(HALF_LIVES)] for h in range(heads)], dtype=torch.float64)
        self.log_rate = nn.Parameter(torch.zeros(heads))
        self.decay_bias = nn.Parameter(torch.expm1(math.log(2) / half_lives).log().float())
        self.write_bias = nn.Parameter(torch.zeros(heads))
        self.late = late

    def recall(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """:func:`by_chunk` with gates by `x`; of `q`, [batch, queries, time, dk], as many in turn read one head's state."""
        a, b = self.gate_proj(x).transpose(1, 2).chunk(2, 1)
        g = -self.log_rate.exp()[:, None] * F.softplus(a + self.decay_bias[:, None])
        beta = torch.sigmoid(b + self.write_bias[:, None])
        unit = lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
        k = unit(k)
        if self.late:
            k, v, g, beta = self.late(k), self.late(v), self.late(g[..., None])[..., 0], self.late(beta[..., None])[..., 0]
        group = q.shape[1] // k.shape[1]
        return by_chunk(unit(q), *(y.repeat_interleave(group, 1) for y in (k, v, g, beta)))


class Matrices(ByKey):
    """A cell of `heads` states of [value, key] that adds `rho · o_proj(m)` to the results of attention.

    `in_proj` has the rows of all queries, keys, values and output gates, in this order; `gate_proj` those of alpha, then beta.
    `rho` is 0 where a trained model gets a cell, so that it computes what it did, and 1 in a model trained with it.
    """

    def __init__(self, hidden: int, width: int, heads: int, key: int, value: int, weights: str, rho: float, late: Late | None):
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        keys, values = heads * key, heads * value
        self.in_proj = BitLinear(hidden, 2 * keys + 2 * values, weights)
        self.gate_proj = BitLinear(hidden, 2 * heads, "ternary")
        self.o_proj = BitLinear(values, width, "ternary")
        # A key is what its predecessor was, its value what comes now: "key value" binds without help from attention.
        taps = torch.zeros(2 * keys + values, 4)
        taps[:, 3], taps[keys : 2 * keys] = 1.0, torch.tensor([0.0, 0.0, 1.0, 0.0])
        self.taps = nn.Parameter(taps + 0.05 * torch.randn(taps.shape))
        self.set_decay(heads, late)
        self.norm = nn.Parameter(torch.ones(value))
        self.rho = nn.Parameter(torch.full((width,), rho))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to attention's results, of which `x`, [batch, time, hidden], is the quantized input."""
        keys, values = self.heads * self.key, self.heads * self.value
        taken, gate = self.in_proj(x).split((2 * keys + values, values), -1)
        taken = F.silu(mix(taken, self.taps))
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        o = self.recall(x, *map(heads, taken.split((keys, keys, values), -1))).transpose(1, 2)
        m = F.rms_norm(o, (self.value,), self.norm, 1e-5) * F.silu(gate.unflatten(-1, (self.heads, -1)))
        return self.rho * self.o_proj(int8(m.flatten(-2)))


class Shared(ByKey):
    """Matrices, one for each key head, that take attention's own queries, keys and values as they are before rotation.

    What the queries recall, normalized head by head, is added to attention's results `rho` times.
    """

    def __init__(self, hidden: int, width: int, kv_heads: int, head_dim: int, rho: float, late: Late | None):
        super().__init__()
        self.gate_proj = BitLinear(hidden, 2 * kv_heads, "ternary")
        self.set_decay(kv_heads, late)
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.rho = nn.Parameter(torch.full((width,), rho))

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is added to attention's results, of which `x` is the quantized input; `q` is [batch, heads, time, head_dim]."""
        o = self.recall(x, q, k, v)
        return self.rho * F.rms_norm(o, o.shape[-1:], self.norm, 1e-5).transpose(1, 2).flatten(-2)


class Vector(nn.Module):
    """A cell of one state of `numbers` that adds `rho · o_proj(m)` to the results of attention.

    `in_proj` has the rows of what is taken in, of what decides how much is kept, and of the output gates, in this order. `bound` is
    the least that is kept.
    """

    def __init__(self, hidden: int, width: int, numbers: int, weights: str, rho: float, late: Late | None):
        super().__init__()
        self.numbers, self.late = numbers, late
        self.in_proj = BitLinear(hidden, 3 * numbers, weights)
        self.o_proj = BitLinear(numbers, width, "ternary")
        taps = torch.zeros(2 * numbers, 4)
        taps[:, 3] = 1.0
        self.taps = nn.Parameter(taps + 0.05 * torch.randn(taps.shape))
        self.bound = nn.Parameter(torch.zeros(numbers))
        self.forget_bias = nn.Parameter(torch.linspace(*FORGET_BIAS, numbers))
        self.norm = nn.Parameter(torch.ones(numbers))
        self.rho = nn.Parameter(torch.full((width,), rho))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to attention's results, of which `x`, [batch, time, hidden], is the quantized input."""
        with torch.no_grad():
            self.bound.copy_(bounded(self.bound))
        taken, gate = self.in_proj(x).split((2 * self.numbers, self.numbers), -1)
        c, f = mix(taken, self.taps).chunk(2, -1)
        f = self.bound + (1 - self.bound) * torch.sigmoid(f + self.forget_bias)
        c = F.silu(c)
        if self.late:
            # Nothing is forgotten where nothing is written.
            c, f = self.late(c), 1 - self.late(1 - f)
        h = by_scan(f, c)
        m = F.rms_norm(h, (self.numbers,), self.norm, 1e-5) * F.silu(gate)
        return self.rho * self.o_proj(int8(m))
