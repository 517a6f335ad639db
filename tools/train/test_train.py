"""What must hold of the modules here: `python -m unittest` in this folder."""
import unittest

import torch
import torch.nn.functional as F

import memory
import quantize
from linear import BitLinear
from model import Config, Model, attend, rotate


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
        torch.set_default_dtype(torch.float64)
        try:
            torch.testing.assert_close(memory.by_chunk(q, k, v, g, beta), memory.by_token(q, k, v, g, beta))
        finally:
            torch.set_default_dtype(torch.float32)

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
        small = dict(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96)
        plain, ids = Model(Config(**small)), torch.randint(0, 512, (1, 30))
        for kind in (dict(heads=2, width=16), dict(numbers=40), dict(shared=1)):
            stateful = Model(Config(**small, window=32, memory=kind, rho=0.0))
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


if __name__ == "__main__":
    unittest.main()
