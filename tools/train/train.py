#!/usr/bin/env python3
"""Trains a small 1-bit story model by distilling a float teacher on the teacher's own samples.

  python train.py --teacher stories260K.bin --samples samples.u16 --tokens 10500000 --out stories
  python train.py --teacher stories260K.bin --samples samples.u16 --variant stateful --from stories --tokens 1500000 --out stateful
  python train.py --teacher stories260K.bin --samples samples.u16 --memory-only --from converted --tokens 1500000 --lr 2e-3 --out fine-tuned

Loss = KL(teacher || student) + 0.1 · cross entropy. Writes a checkpoint for bitnet-pack, and masters to go on from.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from model import Config, Model
from teacher import Teacher
from variants import ADAPTIVE, PRUNED_BY, PRUNINGS, SPARSE, VARIANTS, choose, keep_neurons, share_kept

HELD_OUT = 40_000
"""Tokens at the start of the samples that are never trained on."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", type=Path, required=True, help="a float model of llama2.c")
    p.add_argument("--samples", type=Path, required=True, nargs="+", help="little-endian u16 token ids")
    p.add_argument("--variant", choices=VARIANTS, default="dense")
    p.add_argument("--from", dest="start", type=Path, help="a directory with the weights to start from")
    p.add_argument("--memory-only", action="store_true", help="train the memories of what bitnet-pack convert wrote, and nothing else")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tokens", type=int, required=True, help="how many to train on")
    p.add_argument("--lr", type=float, default=2.5e-3, help="the highest learning rate")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=192)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu", help="where to train, as PyTorch names it: cpu, cuda")
    a = p.parse_args()
    if a.memory_only and (a.start is None or a.variant != "dense"):
        p.error("--memory-only goes with --from, and what is there decides the variant")
    if a.variant in ADAPTIVE and a.start is None:
        p.error(f"--variant {a.variant} chooses by weights: --from says which")
    return a


def distance(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target, logits) in nats a token."""
    log = lambda x: F.log_softmax(x, -1).flatten(0, 1)
    return F.kl_div(log(logits), log(target), reduction="batchmean", log_target=True)


@torch.no_grad()
def held_out(model, data: Tensor, length: int) -> float:
    """Cross entropy in nats a token, over pieces of `length`."""
    total = count = 0
    for i in range(0, len(data) - 8 * length - 1, 8 * length):
        x = torch.stack([data[j : j + length + 1] for j in range(i, i + 8 * length, length)])
        total += F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        count += x[:, 1:].numel()
    return total / count


def optimizer(model: Model, lr: float) -> torch.optim.Optimizer:
    """Decay for matrices alone; what makes a memory forget, and learned thresholds, move slowly."""
    matrices, vectors, slow = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.endswith((".tau", ".alpha")):
            slow.append(p)
        elif p.dim() == 2 and not name.endswith(".taps"):
            matrices.append(p)
        else:
            vectors.append(p)
    groups = [
        dict(params=matrices, weight_decay=0.05, scale=1.0),
        dict(params=vectors, weight_decay=0.0, scale=1.0),
        dict(params=slow, weight_decay=0.0, scale=0.1),
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def main() -> None:
    a = parse()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    teacher = Teacher(a.teacher, a.device)
    data = torch.from_numpy(np.concatenate([np.fromfile(f, "<u2") for f in a.samples]).astype(np.int64))
    held, data = data[:HELD_OUT].to(a.device), data[HELD_OUT:].to(a.device)
    sense = data[: 16 * a.length].view(16, -1)

    def start(options: dict) -> Model:
        model = Model(Config(vocab=teacher.vocab, **options))
        if a.start:
            masters = a.start / "masters.safetensors"
            checkpoint.adopt(model, masters if masters.exists() else a.start / "model.safetensors")
        return model.to(a.device)

    if a.memory_only:
        model = checkpoint.converted(a.start).to(a.device)
        for name, p in model.named_parameters():
            p.requires_grad_(".memory." in name)
    else:
        model = choose(a.variant, start, sense)
    opt = optimizer(model, a.lr)
    rng = torch.Generator().manual_seed(2)
    save = lambda: checkpoint.save_memories(model, a.start, a.out) if a.memory_only else checkpoint.save(model, a.out)
    steps, mean, began, report = a.tokens // (a.batch * a.length), None, time.time(), 60.0
    prunings = {math.ceil(steps * PRUNED_BY * n / PRUNINGS) for n in range(1, PRUNINGS + 1)} if a.variant in SPARSE else ()
    print(f"{'memory only' if a.memory_only else a.variant}: held out {held_out(model, held, a.length):.3f} nats before, teacher {held_out(teacher, held, a.length):.3f}", flush=True)
    for step in range(steps):
        if step in prunings:
            keep_neurons(model, sense, share_kept(step / steps))
        rate = min(1, (step + 1) / 150) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in opt.param_groups:
            group["lr"] = a.lr * rate * group["scale"]
        at = torch.randint(0, len(data) - a.length - 1, (a.batch,), generator=rng)
        x = torch.stack([data[i : i + a.length + 1] for i in at])
        logits = model(x[:, :-1])
        kl = distance(logits, teacher(x[:, :-1]))
        loss = kl + 0.1 * F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        mean = kl.item() if mean is None else 0.98 * mean + 0.02 * kl.item()
        if (elapsed := time.time() - began) > report:
            save()
            report = elapsed + 600
            tokens = (step + 1) * a.batch * a.length
            print(f"{elapsed:.0f} s, {tokens / 1e6:.2f} M tokens, {tokens / elapsed:.0f}/s: KL {mean:.3f}, held out {held_out(model, held, a.length):.3f}", flush=True)
    save()
    result = dict(variant="memory only" if a.memory_only else a.variant, tokens=steps * a.batch * a.length, start=str(a.start), held_out=held_out(model, held, a.length))
    (a.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
