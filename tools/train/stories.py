#!/usr/bin/env python3
"""Trains a small ternary (BitNet b1.58) story model on a CPU by distilling a float teacher on the teacher's own samples.

  python train.py --teacher stories260K.bin --tokens samples.u16 --seconds 5400 --out DIR [--resume DIR]

The student is Hugging Face's BitNetForCausalLM (squared ReLU, sub-norms, half-split RoPE, tied embeddings): ternary weights by
absmean and int8 activations by absmax, both with straight-through gradients; loss = KL(teacher || student) + 0.1 * cross entropy.
Writes model.safetensors (bf16 masters) and config.json. Needs torch, numpy, safetensors.
"""
import argparse, json, math, os, struct, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

EPS = 1e-5


class Ternary(torch.autograd.Function):
    """w -> clamp(round(w / mean|w|), -1, 1) * mean|w|, gradient passed straight through."""
    @staticmethod
    def forward(ctx, w):
        s = 1.0 / w.abs().mean().clamp_(min=EPS)
        return (w * s).round_().clamp_(-1, 1).div_(s)

    @staticmethod
    def backward(ctx, g):
        return g


class Int8(torch.autograd.Function):
    """Per token: q = clamp(round(x * 127 / max|x|), -128, 127), gradient passed straight through."""
    @staticmethod
    def forward(ctx, x):
        s = 127 / x.abs().amax(-1, keepdim=True).clamp_(min=EPS)
        return (x * s).round_().clamp_(-128, 127).div_(s)

    @staticmethod
    def backward(ctx, g):
        return g


class BitLinear(nn.Linear):
    """[.., in] already quantised by the caller -> [.., out]."""
    def forward(self, xq):
        return F.linear(xq, Ternary.apply(self.weight))


class RMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, d, heads, kv):
        super().__init__()
        self.heads, self.kv, self.hd = heads, kv, d // heads
        self.q_proj = BitLinear(d, d, bias=False)
        self.k_proj = BitLinear(d, kv * self.hd, bias=False)
        self.v_proj = BitLinear(d, kv * self.hd, bias=False)
        self.o_proj = BitLinear(d, d, bias=False)
        self.attn_sub_norm = RMSNorm(d)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        xq = Int8.apply(x)
        q = self.q_proj(xq).view(b, t, self.heads, self.hd).transpose(1, 2)
        k = self.k_proj(xq).view(b, t, self.kv, self.hd).transpose(1, 2)
        v = self.v_proj(xq).view(b, t, self.kv, self.hd).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        r = self.heads // self.kv
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        return self.o_proj(Int8.apply(self.attn_sub_norm(y)))


class Mlp(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.gate_proj = BitLinear(d, ffn, bias=False)
        self.up_proj = BitLinear(d, ffn, bias=False)
        self.down_proj = BitLinear(ffn, d, bias=False)
        self.ffn_sub_norm = RMSNorm(ffn)

    def forward(self, x):
        xq = Int8.apply(x)
        h = F.relu(self.gate_proj(xq)).square() * self.up_proj(xq)
        return self.down_proj(Int8.apply(self.ffn_sub_norm(h)))


class Block(nn.Module):
    def __init__(self, d, heads, kv, ffn):
        super().__init__()
        self.self_attn, self.mlp = Attention(d, heads, kv), Mlp(d, ffn)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Student(nn.Module):
    def __init__(self, vocab, d, layers, heads, kv, ffn, theta=10000.0):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Block(d, heads, kv, ffn) for _ in range(layers))
        self.norm = RMSNorm(d)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        hd = d // heads
        self.register_buffer('inv', 1.0 / theta ** (torch.arange(0, hd, 2).float() / hd), persistent=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        t = torch.arange(ids.shape[1]).float()[:, None] * self.inv
        cos, sin = t.cos(), t.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x) @ self.embed_tokens.weight.t()


class Teacher:
    """A llama2.c version-0 float model: a header of seven i32, then the f32 matrices in the order taken below."""
    def __init__(self, path):
        raw = open(path, 'rb').read()
        self.d, hidden, self.layers, self.heads, self.kv, vocab, _ = struct.unpack('7i', raw[:28])
        self.vocab, off = abs(vocab), [28]

        def take(*shape):
            n = int(np.prod(shape))
            a = torch.from_numpy(np.frombuffer(raw, np.float32, n, off[0]).copy()).view(*shape)
            off[0] += 4 * n
            return a
        d, n, kvd = self.d, self.layers, self.kv * self.d // self.heads
        self.emb, self.ra = take(self.vocab, d), take(n, d)
        self.q, self.k, self.v, self.o = take(n, d, d), take(n, kvd, d), take(n, kvd, d), take(n, d, d)
        self.rf, self.w1, self.w2, self.w3, self.rn = take(n, d), take(n, hidden, d), take(n, d, hidden), take(n, hidden, d), take(d)
        hd = d // self.heads
        self.inv = 1.0 / 10000.0 ** (torch.arange(0, hd, 2).float() / hd)

    @torch.no_grad()
    def __call__(self, ids):
        b, t = ids.shape
        hd, r = self.d // self.heads, self.heads // self.kv
        angle = torch.arange(t).float()[:, None] * self.inv
        cos, sin = angle.cos(), angle.sin()

        def rope(a):  # interleaved pairs
            x, y = a[..., 0::2], a[..., 1::2]
            return torch.stack((x * cos - y * sin, x * sin + y * cos), -1).flatten(-2)
        x = self.emb[ids]
        for l in range(self.layers):
            y = F.rms_norm(x, (self.d,), self.ra[l], EPS)
            q = rope((y @ self.q[l].t()).view(b, t, self.heads, hd).transpose(1, 2))
            k = rope((y @ self.k[l].t()).view(b, t, self.kv, hd).transpose(1, 2))
            v = (y @ self.v[l].t()).view(b, t, self.kv, hd).transpose(1, 2)
            a = F.scaled_dot_product_attention(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), is_causal=True)
            x = x + a.transpose(1, 2).reshape(b, t, self.d) @ self.o[l].t()
            y = F.rms_norm(x, (self.d,), self.rf[l], EPS)
            x = x + (F.silu(y @ self.w1[l].t()) * (y @ self.w3[l].t())) @ self.w2[l].t()
        return F.rms_norm(x, (self.d,), self.rn, EPS) @ self.emb.t()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--teacher', required=True)
    p.add_argument('--tokens', required=True, nargs='+', help='little-endian u16 token ids')
    p.add_argument('--out', required=True)
    p.add_argument('--resume')
    p.add_argument('--seconds', type=float, default=5400)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--lr', type=float, default=2.5e-3)
    for name, value in dict(hidden=256, layers=4, heads=8, kv=4, ffn=512, batch=8, length=192).items():
        p.add_argument('--' + name, type=int, default=value)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    teacher = Teacher(a.teacher)
    vocab = teacher.vocab
    model = Student(vocab, a.hidden, a.layers, a.heads, a.kv, a.ffn)
    if a.resume:
        state = load_file(os.path.join(a.resume, 'model.safetensors'))
        model.load_state_dict({k.removeprefix('model.'): v.float() for k, v in state.items()})
    data = torch.from_numpy(np.concatenate([np.fromfile(f, '<u2') for f in a.tokens]).astype(np.int64))
    held, train = data[:40_000], data[40_000:]
    matrices = [q for q in model.parameters() if q.dim() == 2]
    vectors = [q for q in model.parameters() if q.dim() < 2]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)],
                            lr=a.lr, betas=(0.9, 0.95), fused=True)
    rng = torch.Generator().manual_seed(2)

    @torch.no_grad()
    def held_out():
        s = k = n = 0
        for i in range(0, len(held) - 8 * a.length - 1, 8 * a.length):
            x = torch.stack([held[j:j + a.length + 1] for j in range(i, i + 8 * a.length, a.length)])
            y = x[:, 1:].reshape(-1)
            s += F.cross_entropy(model(x[:, :-1]).reshape(-1, vocab), y, reduction='sum').item()
            k += F.cross_entropy(teacher(x[:, :-1]).reshape(-1, vocab), y, reduction='sum').item()
            n += y.numel()
        return s / n, k / n

    def save():
        os.makedirs(a.out, exist_ok=True)
        save_file({'model.' + k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()},
                  os.path.join(a.out, 'model.safetensors'), metadata={'format': 'pt'})
        config = dict(architectures=['BitNetForCausalLM'], model_type='bitnet', vocab_size=vocab, hidden_size=a.hidden,
                      intermediate_size=a.ffn, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv,
                      hidden_act='relu2', rms_norm_eps=EPS, max_position_embeddings=512, tie_word_embeddings=True,
                      bos_token_id=1, eos_token_id=2, rope_theta=10000.0, torch_dtype='bfloat16',
                      quantization_config=dict(quant_method='bitnet', linear_class='autobitlinear', quantization_mode='online'))
        json.dump(config, open(os.path.join(a.out, 'config.json'), 'w'), indent=1)

    start, step, mean, report = time.time(), 0, None, 60.0
    while (elapsed := time.time() - start) < a.seconds:
        rate = a.lr * min(1, (step + 1) / 150) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * elapsed / a.seconds)))
        for group in opt.param_groups:
            group['lr'] = rate
        at = torch.randint(0, len(train) - a.length - 1, (a.batch,), generator=rng)
        x = torch.stack([train[i:i + a.length + 1] for i in at])
        ids, y = x[:, :-1], x[:, 1:]
        logits, target = model(ids), teacher(ids)
        kl = F.kl_div(F.log_softmax(logits, -1).reshape(-1, vocab), F.log_softmax(target, -1).reshape(-1, vocab),
                      reduction='batchmean', log_target=True)
        loss = kl + 0.1 * F.cross_entropy(logits.reshape(-1, vocab), y.reshape(-1))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        step += 1
        mean = kl.item() if mean is None else 0.98 * mean + 0.02 * kl.item()
        if elapsed > report:
            s, k = held_out()
            save()
            report += 120
            tokens = step * a.batch * a.length
            print(f'{elapsed:.0f} s, {tokens / 1e6:.2f} M tokens at {tokens / elapsed:.0f}/s: KL {mean:.3f}, held out {s:.3f} nats (teacher {k:.3f})', flush=True)
    save()
    print('held out, teacher:', held_out())


if __name__ == '__main__':
    main()
