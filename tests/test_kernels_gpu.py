"""On a GPU only: the real tile sizes, which no interpreter can run, on several tiles, twice, in half precision.
The other tests of kernels run there too, in fp32, fp16 and bf16:   pytest tests/test_kernels_*.py -n 8"""
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, tiny_model
from kernel_cases import check, kernels_only, leaf, random  # noqa: F401

import lora
import sampling
import sft
from kernels import attention as A
from kernels import decode as D
from kernels import glu, head, nf4, norm, rope, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def gradients(function, inputs, given):
    inputs = [leaf(x) for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, given.to(out.dtype))


def compare(function, reference, inputs, given, names):
    """Against float64, no worse than 1.5 times the same in eager half precision (plus what rounds to nothing), twice
    the same bits."""
    ours, again = (gradients(function, inputs, given) for _ in range(2))
    exact = gradients(reference, [x.double() for x in inputs], given.double())
    plain = gradients(reference, inputs, given)
    for name, a, b, e, p in zip(names, ours, again, exact, plain):
        assert torch.equal(a, b), f"{name} differs from run to run"
        eager = float((p.double() - e).norm() / e.norm())
        check(a, e, min(1e-2, 1.5 * eager + 1e-3), name)


@HALF
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("everything", [False, True], ids=["causal", "everything"])
def test_attention_in_its_real_tiles(D, everything, dtype):
    T = 700
    docs = torch.ones(2, T, dtype=torch.int64)
    docs[0, 300:], docs[0, 600:], docs[1, :77] = 2, 3, 0
    spans = A.spans(T, docs=docs.cuda(), prefix=150, window=400) if everything else A.spans(T, device="cuda")
    q = random(2, T, 4, D, dtype=dtype).transpose(1, 2)
    k, v = (random(2, T, 2, D, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2))
    options = (torch.tensor([0.3, 0.1, 0.05, 0.01], device="cuda"), 20.0) if everything else ()
    compare(lambda *x: A.attention(*x, spans, *options), lambda *x: A.ref_attention(*x, spans, *options), (q, k, v),
            random(2, 4, T, D, dtype=dtype, seed=3), ("out", "dq", "dk", "dv"))


def test_a_window_over_a_long_row():
    spans = A.spans(5000, window=300, device="cuda")
    q, k, v, do = (random(1, 2, 5000, 64, dtype=torch.bfloat16, seed=i) for i in range(4))
    compare(lambda *x: A.attention(*x, spans), lambda *x: A.ref_attention(*x, spans), (q, k, v), do,
            ("out", "dq", "dk", "dv"))


@HALF
@pytest.mark.parametrize("H, K, dim", [(32, 8, 128), (8, 8, 64), (16, 1, 80), (8, 4, 256)])
def test_decode(H, K, dim, dtype):
    q, k, v = random(5, H, dim, dtype=dtype), random(5, K, 3000, dim, dtype=dtype, seed=1), \
        random(5, 3000, K, dim, dtype=dtype, seed=2).transpose(1, 2)
    lo = torch.tensor([0, 2999, 1000, 0, 64], dtype=torch.int32, device="cuda")
    hi = torch.tensor([3000, 3000, 1700, 1, 128], dtype=torch.int32, device="cuda")
    out = D.decode(q, k, v, lo, hi)
    check(out, D.ref_decode(q.double(), k.double(), v.double(), lo, hi), 5e-3)
    assert torch.equal(out, D.decode(q, k, v, lo, hi))


@pytest.mark.parametrize("V", [32000, 128256, 50257])
def test_head_in_chunks_of_its_real_size(V, monkeypatch):
    """Chunks of 512 rows; the products need no multiple of anything (50,257)."""
    monkeypatch.setattr(head, "BUDGET", {"cuda": 512 * V * 2, "cpu": 1})
    h, w = random(1100, 256, dtype=torch.bfloat16), random(V, 256, dtype=torch.bfloat16, seed=1, scale=0.05)
    targets = torch.randint(0, V, (1100,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    compare(lambda *x: head.linear_cross_entropy(*x, targets, torch.tensor(1 / 1100)),
            lambda h, w: F.cross_entropy(F.linear(h, w).to(torch.promote_types(h.dtype, torch.float32)), targets),
            (h, w), torch.ones((), device="cuda"), ("loss", "dh", "dw"))


def test_head_in_one_chunk_and_the_same_bits_with_and_without_gradient():
    """One chunk sums dW inside the product. PPO's first ratio is exactly 1 only if log p has the same bits."""
    V = 50257
    h, w = random(700, 512, dtype=torch.bfloat16), random(V, 512, dtype=torch.bfloat16, seed=1, scale=0.05)
    targets = torch.randint(0, V, (700,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    compare(lambda *x: head.linear_cross_entropy(*x, targets, torch.tensor(1 / 700)),
            lambda h, w: F.cross_entropy(F.linear(h, w).to(torch.promote_types(h.dtype, torch.float32)), targets),
            (h, w), torch.ones((), device="cuda"), ("loss", "dh", "dw"))
    for temperature, cap in ((1.0, 0.0), (0.7, 0.0), (0.7, 30.0)):
        logp, _ = head.linear_logprobs(leaf(h), w, targets, temperature=temperature, softcap=cap)
        with torch.no_grad():
            again, _ = head.linear_logprobs(h, w, targets, temperature=temperature, softcap=cap)
        assert torch.equal(logp, again)


def test_sampling_from_a_real_vocabulary():
    logits = random(16, 128256, dtype=torch.bfloat16, scale=3.0)
    noise = torch.rand(16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for k, p in ((None, None), (50, None), (None, 0.9), (50, 0.9)):
        ids, logp = sample.sample(logits, noise, 0.8, k, p)
        expected, expected_logp = sample.ref_sample(logits.double(), noise.double(), 0.8, k, p)
        same = ids == expected                                         # a draw on the border of two tokens may differ
        assert int(same.sum()) >= 15 and float((logp - expected_logp)[same].abs().max()) < 1e-3


@HALF
@pytest.mark.parametrize("C", [576, 4096, 8192])
def test_norms(C, dtype):
    for layer in (False, True):
        compare(lambda x, w, layer=layer: norm.norm(x, w, None, 1e-5, layer, None),
                lambda x, w, layer=layer: norm.ref_norm(x, w, None, 1e-5, layer),
                (random(3000, C, dtype=dtype), random(C, dtype=dtype, seed=1)), random(3000, C, dtype=dtype, seed=2),
                ("y", "dx", "dw"))


@HALF
def test_glu(dtype):
    gate, up = random(512, 11008, dtype=dtype), random(512, 11008, dtype=dtype, seed=1)
    for kind in glu.KINDS:
        compare(lambda *x, kind=kind: glu.glu(*x, kind), lambda *x, kind=kind: glu.ref_glu(*x, kind), (gate, up),
                random(512, 11008, dtype=dtype, seed=2), ("h", "dgate", "dup"))


def test_a_decoding_step_in_a_cuda_graph():
    """The lengths live on the device: a captured step serves every length."""
    q = random(4, 8, 64, dtype=torch.bfloat16)
    k, v = (random(4, 2, 500, 64, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    lo, hi = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.full((4,), 100, dtype=torch.int32, device="cuda")
    D.decode(q, k, v, lo, hi)
    torch.use_deterministic_algorithms(False)                          # filling memory with NaN is no part of the step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = D.decode(q, k, v, lo, hi)
    for n in (100, 7, 500):
        hi.fill_(n)
        graph.replay()
        check(out, D.ref_decode(q.double(), k.double(), v.double(), lo, hi), 5e-3, f"length {n}")


# ---------------------------------------------------------------- the model on the card

@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"window": 7}, {"positions": "learned"},
                                     {"positions": "rope_2d", "prefix_ids": (90, 91), "num_kv_heads": 4}], ids=str)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_generation_from_a_graph_is_plain_generation(changes, settings, monkeypatch):
    """The second step is recorded, the others are replayed; text, log-probabilities, and what the generator draws next.
    In fp32: the keys are split by the size of the cache, which rounds differently."""
    replays = []

    class Watched(sampling.Replay):
        def __call__(self):
            super().__call__()
            replays.append(self.graph)
    monkeypatch.setattr(sampling, "Replay", Watched)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "auto")
    torch.use_deterministic_algorithms(False)                          # filling memory with NaN is no part of a step
    model = tiny_model(**changes).cuda()
    lora.apply(model, 4, 8.0, name="a")
    randomize(model, 3)
    ids = torch.randint(0, 90, (5, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -2], ids[:, -1] = 91, 90
    mask = (torch.arange(9) >= torch.tensor([0, 5, 7, 2, 4])[:, None]).long()
    out = []
    with lora.use(model, "a"):
        for graph in (False, True):
            generator, logprobs = torch.Generator("cuda").manual_seed(1), []
            new = model.generate(ids.cuda(), 40, mask.cuda(), eos_ids=(3, 5), generator=generator, logprobs=logprobs,
                                 graph=graph, **settings)
            out.append((new, torch.stack(logprobs, 1), torch.rand(3, generator=generator, device="cuda")))
    (a, p, x), (b, q, y) = out
    assert torch.equal(a, b) and torch.equal(x, y)
    check(q, p, 1e-4)
    assert len(replays) > 16 and replays[0] is None and replays[1] is not None and len(set(replays[1:])) == 1


def test_kernels_under_the_compiler(monkeypatch):
    """One graph each, and the numbers of eager."""
    monkeypatch.setenv("CHATPIXIU_KERNELS", "auto")
    torch.use_deterministic_algorithms(False)
    half = {"dtype": torch.bfloat16}
    x, w, up = random(3000, 4096, **half), random(4096, seed=1, **half), random(3000, 4096, seed=2, **half)
    q, k = random(2, 8, 200, 64, **half), random(2, 2, 200, 64, seed=1, **half)
    cos, sin = (f(random(2, 1, 200, 64, seed=4)).bfloat16() for f in (torch.cos, torch.sin))
    docs = torch.ones(2, 200, dtype=torch.int64, device="cuda")
    docs[0, :30] = 0
    packed, noise = nf4.quantise(up), torch.rand(3000, device="cuda")
    lo = torch.tensor([30, 0], dtype=torch.int32, device="cuda")
    for name, function, inputs in (
            ("norm", lambda x, w: norm.rms_norm(x, w, 1e-6), (x, w)),
            ("glu", lambda a, b: glu.glu(a, b, "silu"), (x, up)),
            ("rope", lambda q, k: rope.rope(q, k, cos, sin), (q, k)),
            ("nf4", lambda x: nf4.nf4_linear(x, packed), (x,)),
            ("attention", lambda q, k: A.attention(q, k, k, A.spans(200, docs=docs)), (q, k)),
            ("decode", lambda q, k: D.decode(q[:, :, -1], k, k, lo, lo + 100), (q, k)),
            ("sample", lambda x: sample.sample(x, noise, 0.7, 50, 0.9)[1], (x,))):
        torch._dynamo.reset()
        expected, got = function(*inputs), torch.compile(function, fullgraph=True)(*inputs)
        for a, b in zip(got, expected) if isinstance(got, tuple) else ((got, expected),):
            check(a, b, 1e-2, name)


def test_a_compiled_model_trains_as_the_eager_one(monkeypatch):
    """Graph breaks are allowed here, other gradients are not."""
    monkeypatch.setenv("CHATPIXIU_KERNELS", "auto")
    torch.use_deterministic_algorithms(False)
    model = tiny_model().cuda()
    ids = torch.randint(0, 90, (2, 64), device="cuda")
    grads = []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        F.cross_entropy(call(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, g in grads[0].items():
        check(grads[1][name], g, 1e-4, name)


@HALF
def test_a_step_of_training_over_four_bits(dtype):
    """On the card and on a CPU: the same loss and the same gradients of the adapters."""
    grads = {}
    for device, kind in (("cuda", dtype), ("cpu", torch.float32)):
        model = tiny_model()
        for path, m in list(model.named_modules()):
            if isinstance(m, torch.nn.Linear) and path.startswith("layers"):
                q = nf4.quantise(m.weight.to(device))._replace(dtype=kind)
                model.set_submodule(path, nf4.QuantisedLinear(q))
        for part in (model.embed_tokens, model.lm_head, model.norm, *(layer.input_layernorm for layer in model.layers),
                     *(layer.post_attention_layernorm for layer in model.layers)):
            part.to(device, kind)
        lora.apply(model, 4, 8.0, name="a")
        generator = torch.Generator().manual_seed(2)
        for _, p in lora.parameters(model, "a"):
            p.data = (torch.randn(p.shape, generator=generator) * 0.1).to(device)
        ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CHATPIXIU_KERNELS", "auto")
            with lora.use(model, "a"):
                loss = sft.batch_loss(model, ids, None, torch.ones_like(ids))
            loss.backward()
        grads[device] = [loss, *(p.grad for _, p in lora.parameters(model, "a"))]
    for a, b in zip(grads["cuda"], grads["cpu"]):
        check(a.cpu(), b, 3e-2)
