#!/usr/bin/env python3
"""Draws the stories that models are trained on from their teacher: at temperature 1 and top-p 0.95, each from id 1 on.

  python sample.py --teacher stories260K.bin --tokens 8800000 --out samples.u16
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from teacher import Teacher

BOS, TOP_P = 1, 0.95
LONGEST = 401
"""Ids of a story at most, the first with them."""


def draw(logits: Tensor, rng: torch.Generator) -> Tensor:
    """One id [batch, 1] for `logits` [batch, vocab], of the likeliest ones that have `TOP_P` together."""
    shares, order = logits.softmax(-1).sort(-1, descending=True)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= TOP_P, 0)
    return order.gather(1, torch.multinomial(shares, 1, generator=rng))


def stories(teacher: Teacher, count: int, rng: torch.Generator) -> list[Tensor]:
    """So many stories, each until the teacher would begin another."""
    ids, past = torch.full((count, 1), BOS, device=rng.device), []
    while ids.shape[1] < LONGEST and not (ids[:, 1:] == BOS).any(1).all():
        ids = torch.cat((ids, draw(teacher(ids[:, -1:], past)[:, 0], rng)), 1)
    ends = [(row[1:] == BOS).nonzero().flatten().tolist() + [LONGEST] for row in ids]
    return [row[: 1 + end[0]] for row, end in zip(ids, ends)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", type=Path, required=True, help="a float model of llama2.c")
    p.add_argument("--tokens", type=int, required=True, help="how many to draw at least; the last story is not cut off")
    p.add_argument("--out", type=Path, required=True, help="where to write them, little-endian u16")
    p.add_argument("--batch", type=int, default=64, help="stories at a time")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu", help="where to draw, as PyTorch names it: cpu, cuda")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    teacher, rng, left = Teacher(a.teacher, a.device), torch.Generator(a.device).manual_seed(1), a.tokens
    with a.out.open("wb") as file:
        while left > 0:
            for story in stories(teacher, a.batch, rng):
                file.write(story.cpu().numpy().astype("<u2").tobytes())
                left -= len(story)
            print(f"{a.tokens - left} of {a.tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
