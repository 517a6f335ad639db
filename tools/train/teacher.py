"""The float model that is distilled: a file of llama2.c."""
import struct

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


class Teacher:
    """A llama2.c version-0 float model: a header of seven i32, then the f32 matrices in the order taken below."""

    def __init__(self, path: str, device: str = "cpu"):
        with open(path, "rb") as file:
            raw = file.read()
        self.d, hidden, self.layers, self.heads, self.kv, vocab, _ = struct.unpack("7i", raw[:28])
        self.vocab, at = abs(vocab), 28

        def take(*shape: int) -> Tensor:
            nonlocal at
            n = int(np.prod(shape))
            at += 4 * n
            return torch.from_numpy(np.frombuffer(raw, np.float32, n, at - 4 * n).copy()).view(*shape).to(device)

        d, n, kvd = self.d, self.layers, self.kv * self.d // self.heads
        self.embedding, self.attention_norm = take(self.vocab, d), take(n, d)
        self.q, self.k, self.v, self.o = take(n, d, d), take(n, kvd, d), take(n, kvd, d), take(n, d, d)
        self.ffn_norm, self.gate, self.down, self.up = take(n, d), take(n, hidden, d), take(n, d, hidden), take(n, hidden, d)
        self.norm = take(d)
        head_dim = d // self.heads
        self.frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)

    @torch.no_grad()
    def __call__(self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Logits [batch, time, vocab] of ids [batch, time].

        `past` is a list that is empty at first and takes keys and values, so that further ids, one at a time, go on from there.
        """
        start = past[0][0].shape[2] if past else 0
        assert start == 0 or ids.shape[1] == 1
        angle = torch.arange(start, start + ids.shape[1], device=ids.device)[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()

        def rope(x: Tensor) -> Tensor:  # neighbours turn together
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        def heads(x: Tensor, w: Tensor, n: int) -> Tensor:
            return (x @ w.mT).unflatten(-1, (n, -1)).transpose(1, 2)

        x, shared = self.embedding[ids], self.heads // self.kv
        for layer in range(self.layers):
            y = F.rms_norm(x, (self.d,), self.attention_norm[layer], EPS)
            q = rope(heads(y, self.q[layer], self.heads))
            k, v = rope(heads(y, self.k[layer], self.kv)), heads(y, self.v[layer], self.kv)
            if past is not None:
                if start:
                    k, v = (torch.cat(of, 2) for of in zip(past[layer], (k, v)))
                past[layer : layer + 1] = [(k, v)]
            k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
            x = x + y.transpose(1, 2).flatten(-2) @ self.o[layer].mT
            y = F.rms_norm(x, (self.d,), self.ffn_norm[layer], EPS)
            x = x + (F.silu(y @ self.gate[layer].mT) * (y @ self.up[layer].mT)) @ self.down[layer].mT
        return F.rms_norm(x, (self.d,), self.norm, EPS) @ self.embedding.mT
