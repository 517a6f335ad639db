#!/usr/bin/env python3
"""Trains and tests long memory: pairs of a key and a value, thousands of tokens that say nothing, then questions for values.

  python recall.py --out recall
  python recall.py --memory 0 --out recall-window

A sequence is four tokens of filler (which become the sinks), pairs `key value` in random order, filler, and keys again, each of
which must be answered by its value. Answers are never shown. Training goes from short sequences to long ones.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from model import Config, Model
from train import optimizer

KEYS, VALUES, FILLER = 64, 64, 128
"""Ids 0 to 63 are keys, then come values, then filler."""
STAGES = (
    # length, window, batch, fewest and most pairs, share of the tokens trained on
    (64, 8, 32, 4, 8, 0.30),
    (256, 32, 12, 4, 16, 0.25),
    (1024, 128, 4, 8, 32, 0.20),
    (4096, 256, 1, 8, 64, 0.25),
)
QUERIES = 32


def sequences(rng: torch.Generator, batch: int, length: int, pairs: int, queries: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids [batch, length], and the answers [batch, queries] that are due after the last `queries` of them."""
    ids = torch.randint(KEYS + VALUES, KEYS + VALUES + FILLER, (batch, length), generator=rng)
    keys = torch.rand(batch, KEYS, generator=rng).argsort(-1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=rng)
    ids[:, 4 : 4 + 2 * pairs] = torch.stack((keys, values), -1).flatten(1)
    asked = torch.randint(pairs, (batch, queries), generator=rng)
    ids[:, length - queries :] = keys.gather(1, asked)
    return ids.to(device), values.gather(1, asked).to(device)


@torch.no_grad()
def recall(model: Model, length: int, pairs: int, count: int, device: str) -> float:
    """The share of right answers among values, over `count` sequences of their own."""
    rng, right = torch.Generator().manual_seed(1_000_003 * length + pairs), 0
    for _ in range(count):
        ids, answers = sequences(rng, 1, length, pairs, QUERIES, device)
        scores = model(ids)[:, -QUERIES:, KEYS : KEYS + VALUES]
        right += (scores.argmax(-1) + KEYS == answers).sum().item()
    return right / (count * QUERIES)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--memory", type=int, default=4, help="heads of the memory; 0: attention to the window alone")
    p.add_argument("--tokens", type=int, default=8_000_000, help="how many to train on")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu", help="where to train, as PyTorch names it: cpu, cuda")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    shape = dict(vocab=KEYS + VALUES + FILLER, hidden=128, layers=2, heads=4, kv_heads=4, ffn=256)
    model = Model(Config(**shape, window=STAGES[0][1], memory=dict(heads=a.memory, width=32) if a.memory else {})).to(a.device)
    opt, rng, began = optimizer(model, a.lr), torch.Generator().manual_seed(2), time.time()
    for length, window, batch, fewest, most, share in STAGES:
        model.c.window = window
        steps = max(1, int(a.tokens * share) // (batch * length))
        mean = None
        for step in range(steps):
            warm, last = min(1.0, (step + 1) / 50), length == STAGES[-1][0]
            rate = warm * (1.0 - 0.9 * step / steps if last else 1.0) * (64 / length) ** 0.25
            for group in opt.param_groups:
                group["lr"] = a.lr * rate * group["scale"]
            pairs = int(torch.randint(fewest, most + 1, (1,), generator=rng))
            queries = length - 4 - 2 * pairs if length <= 256 and step % 2 == 0 else min(QUERIES, length // 4)
            ids, answers = sequences(rng, batch, length, pairs, queries, a.device)
            loss = F.cross_entropy(model(ids)[:, -queries:].flatten(0, 1), answers.flatten())
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            if step % max(1, steps // 8) == 0 or step == steps - 1:
                print(f"{time.time() - began:.0f} s: length {length}, step {step} of {steps}, loss {mean:.3f}", flush=True)
        checkpoint.save(model, a.out)
        print(f"recall at {length}: " + ", ".join(f"{n} pairs {recall(model, length, n, 8, a.device):.1%}" for n in (4, 8, 16)), flush=True)
    table = {f"{length}": {f"{n}": recall(model, length, n, 8, a.device) for n in (4, 16, 64)} for length in (300, 1024, 4096, 16384)}
    ids, answers = sequences(torch.Generator().manual_seed(3), 1, STAGES[-1][0], 16, QUERIES, "cpu")
    (a.out / "questions.json").write_text(json.dumps(dict(input_ids=ids.tolist(), answers=answers.tolist())) + "\n")
    (a.out / "recall.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
