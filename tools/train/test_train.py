"""What must hold of the modules here: `python -m unittest` in this folder."""
import struct
import tempfile
import unittest

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
import quantize
import sample
import variants
from linear import BitLinear
from model import LINEARS, Config, Model, attend, rotate
from quantize import ACTIVATIONS
from teacher import Teacher

SMALL = dict(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96)


class OnlyMeta(TorchDispatchMode):
    """Fails where an operation makes a tensor of another device than `meta`, which multiplication by it alone would let pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            assert not isinstance(made, torch.Tensor) or made.device.type == "meta", f"{func} on {made.device}"
        return out


def teacher(device="cpu"):
    """A small random file of llama2.c, read."""
    d, hidden, layers, heads, kv, vocab = 32, 48, 2, 4, 2, 20
    counts = (vocab * d, layers * d, layers * d * d * 3, 2 * layers * d, layers * hidden * d * 3, d)
    numbers = np.concatenate([np.random.default_rng(1).normal(0, 0.4, n).astype("<f4") for n in counts])
    with tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("<7i", d, hidden, layers, heads, kv, vocab, 512) + numbers.tobytes())
        file.flush()
        return Teacher(file.name, device)


def dense_window(q, k, v, frequencies, window, sinks):
    """:func:`attend` one query at a time."""
    out = []
    for t in range(q.shape[2]):
        ring = list(range(max(sinks, t - window + 1), t + 1))
        cache = list(range(min(sinks, t + 1))) + [s for s in ring if s >= sinks]
        place = min(t, sinks + window - 1)
        at = torch.tensor([s if s < sinks else place - (t - s) for s in cache], dtype=torch.float32)
        query = rotate(q[:, :, t : t + 1], torch.tensor([[float(place)]]) * frequencies)
        keys = rotate(k[:, :, cache], at[:, None] * frequencies)
        shares = (query @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
        out.append(shares @ v[:, :, cache])
    return torch.cat(out, 2)


class Tests(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def test_chunks_of_the_memory_equal_tokens(self):
        q, k = (F.normalize(torch.randn(2, 3, 150, 16, dtype=torch.float64), dim=-1) for _ in range(2))
        v, g = torch.randn(2, 3, 150, 8, dtype=torch.float64), -torch.rand(2, 3, 150, dtype=torch.float64)
        beta = torch.rand(2, 3, 150, dtype=torch.float64)
        torch.testing.assert_close(memory.by_chunk(q, k, v, g, beta), memory.by_token(q, k, v, g, beta))

    def test_a_scan_equals_tokens(self):
        f, c = torch.rand(2, 150, 8, dtype=torch.float64), torch.randn(2, 150, 8, dtype=torch.float64)
        torch.testing.assert_close(memory.by_scan(f, c), memory.number_by_token(f, c))

    def test_window_attention_equals_one_query_at_a_time(self):
        q, k, v = (torch.randn(2, 2, 50, 8) for _ in range(3))
        frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03])
        torch.testing.assert_close(
            attend(q, k, v, frequencies, 12, 3), dense_window(q, k, v, frequencies, 12, 3), rtol=1e-4, atol=1e-5
        )

    def test_a_memory_that_adds_nothing_leaves_the_model_what_it_was(self):
        plain, ids = Model(Config(**SMALL)), torch.randint(0, 512, (1, 30))
        for kind in (dict(heads=2, width=16), dict(numbers=40), dict(shared=1)):
            stateful = Model(Config(**SMALL, window=32, memory=kind, rho=0.0))
            missing = stateful.load_state_dict(plain.state_dict(), strict=False)
            self.assertTrue(all(".memory." in name for name in missing.missing_keys))
            self.assertTrue(torch.equal(plain(ids), stateful(ids)))

    def test_weights_have_one_magnitude(self):
        for kind in ("ternary", "binary", "threshold"):
            linear = BitLinear(40, 30, kind)
            linear.fit_scale()
            linear.live_rows = torch.arange(0, 30, 2)
            w = linear.quantized()
            self.assertEqual(len(w[w != 0].abs().unique()), 1, kind)
            self.assertTrue((w[1::2] == 0).all() and (kind != "binary" or (w[::2] != 0).all()))
            w.square().sum().backward()
            self.assertTrue(linear.weight.grad.abs().sum() > 0)

    def test_half_of_the_activations_are_left(self):
        x = torch.tensor([[1.0, -3.0, 2.0, 2.0, 0.0, -2.0]])
        self.assertEqual((quantize.int8_largest_half(x) != 0).tolist(), [[False, True, True, True, False, False]])

    def test_int4_is_within_its_codes(self):
        x = torch.randn(3, 64)
        codes = quantize.int4(x) * (7**0.5) / x.abs().mean(-1, keepdim=True)
        self.assertTrue(((codes - codes.round()).abs() < 1e-4).all() and codes.min() >= -8.001 and codes.max() <= 7.001)
        codes = quantize.int4_absmax(x) * 7 / x.abs().amax(-1, keepdim=True)
        self.assertTrue(((codes - codes.round()).abs() < 1e-4).all() and (codes.abs().amax(-1) - 7).abs().max() < 1e-4)

    def test_all_is_computed_where_the_model_is(self):
        window, matrices = dict(window=16, sinks=2), dict(heads=2, width=16)
        kinds = {
            "plain": {},
            "sparse": {},
            "window": window,
            "matrices": dict(window, memory=matrices),
            "delayed": dict(window, memory=matrices, delayed_writes=True),
            "vector": dict(window, memory=dict(numbers=40)),
            "delayed vector": dict(window, memory=dict(numbers=40), delayed_writes=True),
            "shared": dict(window, memory=dict(shared=1)),
        }
        kinds |= {kind: dict(weights={name: kind for name in LINEARS}) for kind in ("binary", "threshold", "values")}
        kinds |= {kind: dict(activations={site: kind for site in ("attention", "ffn", "output", "down")}) for kind in ACTIVATIONS}
        for name, options in kinds.items():
            with self.subTest(name):
                model = Model(Config(**SMALL, **options))
                if name == "sparse":
                    variants.keep_neurons(model, torch.randint(0, 512, (1, 30)), 0.5)
                model, ids = model.to("meta"), torch.zeros(2, 150, dtype=torch.long, device="meta")
                with OnlyMeta():
                    model(ids).sum().backward()
                for weights, p in model.named_parameters():
                    self.assertTrue(p.grad is not None and p.grad.device.type == "meta" or weights.endswith(".bound"), weights)
        past, float_model, ids = [], teacher("meta"), torch.zeros(2, 9, dtype=torch.long, device="meta")
        with OnlyMeta():
            float_model(ids, past)
            float_model(ids[:, :1], past)

    def test_bits_are_those_of_an_image(self):
        # As `bitnet-pack inspect` shows them.
        for kind, rows, columns, stored in (("ternary", 128, 256, 7040), ("ternary", 8, 256, 3520), ("binary", 256, 256, 8192)):
            self.assertEqual(variants.image_bits(BitLinear(columns, rows, kind)), 8 * stored)
        linear = BitLinear(512, 256, "ternary")
        linear.live_columns = torch.arange(180)
        self.assertEqual(variants.image_bits(linear), 8 * 10240)

    def test_widths_are_chosen_until_the_average_is_reached(self):
        ids = torch.randint(0, 512, (1, 80))
        for name in variants.ADAPTIVE:
            model = variants.choose(name, lambda options: Model(Config(layers=2, **options)), ids)
            if name in variants.SPARSE:
                variants.keep_neurons(model, ids, variants.KEPT)
            self.assertTrue(1.2 < variants.average_bits(model) <= variants.AVERAGE_BITS, name)
            self.assertEqual({m.kind for m in model.modules() if isinstance(m, BitLinear)} - {"threshold"}, {"ternary", "binary"})
            if name == "all":
                for attention in (layer.self_attn for layer in model.layers):
                    self.assertEqual((attention.v_proj.kind, attention.memory.in_proj.kind), ("binary", "binary"))
                    self.assertTrue({attention.q_proj.kind, attention.k_proj.kind} <= {"threshold", "binary"})

    def test_neurons_are_left_out_little_by_little(self):
        model, ids = Model(Config(**SMALL)), torch.randint(0, 512, (2, 30))
        down, shares = model.layers[1].mlp.down_proj, [variants.share_kept(t) for t in (0, 0.1, 0.3, 0.5, 1)]
        self.assertEqual([round(share, 3) for share in shares], [1, 0.683, 0.392, 0.35, 0.35])
        for share in shares:
            before = set(down.live_columns.tolist())
            torch.nn.init.normal_(model.layers[1].mlp.up_proj.weight)
            variants.keep_neurons(model, ids, share)
            self.assertLessEqual(set(down.live_columns.tolist()), before)
            self.assertEqual(len(down.live_columns), -(-share * 96 // 1))
        self.assertEqual(len((down.quantized() != 0).any(0).nonzero()), 34)

    def test_a_teacher_goes_on_from_what_it_has_seen(self):
        float_model, ids, past = teacher(), torch.randint(0, 20, (3, 12)), []
        parts = [float_model(part, past) for part in (ids[:, :5], *ids[:, 5:].split(1, 1))]
        torch.testing.assert_close(torch.cat(parts, 1), float_model(ids))

    def test_stories_are_drawn_from_what_is_likely(self):
        rng = torch.Generator().manual_seed(1)
        logits = torch.tensor([[0.5, 0.03, 0.3, 0.12, 0.04, 0.01]]).log().expand(5000, -1)
        counts = sample.draw(logits, rng).flatten().bincount(minlength=6)
        self.assertEqual((counts > 0).tolist(), [True, False, True, True, True, False])
        torch.testing.assert_close(counts / 5000, torch.tensor([0.5, 0, 0.3, 0.12, 0.04, 0]) / 0.96, atol=0.03, rtol=0)
        drawn = sample.stories(teacher(), 40, rng)
        self.assertTrue(all(story[0] == 1 and not (story[1:] == 1).any() and len(story) <= sample.LONGEST for story in drawn))
        self.assertGreater(len({len(story) for story in drawn}), 10)


if __name__ == "__main__":
    unittest.main()
