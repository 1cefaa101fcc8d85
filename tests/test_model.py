"""model.py against transformers, against loops that can be checked by eye, and against numbers worked out by hand."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_close,
    error,
    hf_config,
    hf_state,
    needs_packing,
    random_ids,
    randomize,
    tiny_config,
    tiny_model,
    twins,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model as model_file
from model import (
    Cache,
    ModelConfig,
    RMSNorm,
    Transformer,
    alibi_slopes,
    attend,
    count_positions,
    rope_frequencies,
    rope_tables,
    rotate,
)
from sampling import left_pad, packed, sample, shared

FP32, FP64 = 2e-5, 1e-10               # largest difference to transformers, relative to the largest logit
INF = math.inf

ROPES = {                              # (rope_scaling, max_positions)
    "default": (None, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 64),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 64),
    "dynamic_long": ({"rope_type": "dynamic", "factor": 2.0}, 16),             # 40 tokens, trained on 16
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}, 64),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    "yarn_given_factor": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                           "attention_factor": 0.7}, 64),
    "yarn_mscale": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                     "mscale": 0.707, "mscale_all_dim": 1.4}, 64),
    "yarn_no_truncate": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                          "truncate": False, "beta_fast": 8.0, "beta_slow": 0.25}, 64),
}
SHAPES = {
    "gqa": {},
    "mha": {"num_kv_heads": None},
    "mqa": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 20},                                              # 4 heads of 20 in a width of 48
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "tied": {"tie_embeddings": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "theta": {"rope_theta": 500000.0},
    "eps": {"norm_eps": 0.1},
}


def positions_of(mask: Tensor) -> Tensor:
    """The position_ids that transformers wants for a padded batch."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def their_logits(theirs, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    positions = None if mask is None else positions_of(mask)
    return theirs(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def ragged(side: str, lengths=(9, 4, 1, 12), seed: int = 1) -> tuple[Tensor, Tensor]:
    """A batch of rows of these lengths, padded on one side. Pads hold random tokens: nothing may depend on them."""
    T = max(lengths)
    ids, mask = random_ids(len(lengths), T, seed), torch.zeros(len(lengths), T, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, T - n:] = 1 if side == "left" else 0
        mask[row, :n] |= 1 if side == "right" else 0
    return ids, mask


# ---------------------------------------------------------------- the parts against transformers

def test_rms_norm_equals_transformers_and_keeps_eps():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    theirs, ours = LlamaRMSNorm(48, eps=1e-5), RMSNorm(48, 1e-5)
    weight = torch.randn(48)
    theirs.weight.data, ours.weight.data = weight, weight
    for scale in (1.0, 1e-3, 300.0):                                           # at 1e-3 the eps decides
        x = torch.randn(3, 5, 48) * scale
        assert_close(ours(x), theirs(x), 1e-6)
    by_hand = RMSNorm(2, eps=0.5)(torch.tensor([3.0, 4.0]))                    # mean of squares 12.5, root of 13
    assert torch.allclose(by_hand, torch.tensor([3.0, 4.0]) / math.sqrt(13.0), atol=1e-7)
    assert torch.isfinite(ours(torch.zeros(48))).all()


def test_rms_norm_in_bf16_sums_in_fp32():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    theirs, ours = LlamaRMSNorm(256, eps=1e-5).bfloat16(), RMSNorm(256, 1e-5).bfloat16()
    x = (torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == torch.bfloat16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert error(ours(x), exact) < 2 ** -8                                     # one rounding, at the end


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables_equal_transformers(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    scaling, trained = ROPES[name]
    for theta, D in ((10000.0, 12), (500000.0, 64)):
        config = tiny_config(rope_scaling=scaling, rope_theta=theta, head_dim=D, max_positions=trained)
        theirs = LlamaRotaryEmbedding(hf_config(config))
        positions = torch.arange(40)[None]
        cos, sin = theirs(torch.zeros(1), positions)                   # may grow its frequencies: ask for them after
        freq, factor = rope_frequencies(config, 40)
        assert freq.shape == (D // 2,)
        assert float((freq / theirs.inv_freq - 1).abs().max()) < 5e-7
        assert factor == pytest.approx(theirs.attention_scaling, abs=1e-12)
        ours = rope_tables(config, positions, torch.float32)
        assert ours[0].shape == (1, 1, 40, D)
        assert float((ours[0][:, 0] - cos).abs().max()) < 2e-5
        assert float((ours[1][:, 0] - sin).abs().max()) < 2e-5


def test_rope_scalings_differ_from_each_other():
    """Guards the comparison above: a scaling that both sides ignored would also agree."""
    seen = {}
    for name, (scaling, trained) in ROPES.items():
        freq, factor = rope_frequencies(tiny_config(rope_scaling=scaling, max_positions=trained), 40)
        seen[name] = (*[round(x, 9) for x in freq.tolist()], round(factor, 6))
    assert seen.pop("dynamic") == seen["default"]                      # inside the trained length it changes nothing
    assert len(set(seen.values())) == len(seen)


def test_rope_by_hand():
    """Frequencies 10000^(-2i/D); dynamic at twice the trained length with factor 2 has base * 3^(D/(D-2));
    a GGUF file's table of divisors divides."""
    assert rope_frequencies(tiny_config(head_dim=4))[0].tolist() == pytest.approx([1.0, 0.01])
    dynamic = tiny_config(head_dim=4, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_positions=16)
    assert rope_frequencies(dynamic, 32)[0].tolist() == pytest.approx([1.0, (10000 * 3 ** 2) ** -0.5])
    factors = tiny_config(head_dim=4, rope_scaling={"rope_type": "factors", "factors": [1.0, 8.0]})
    assert rope_frequencies(factors)[0].tolist() == pytest.approx([1.0, 0.00125])
    # Position 1, pair (x0, x2) turns by 1 rad, pair (x1, x3) by 0.01 rad.
    cos, sin = rope_tables(tiny_config(head_dim=4), torch.tensor([[1]]), torch.float32)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4), cos, sin).flatten()
    expected = [math.cos(1), -2 * math.sin(0.01), math.sin(1), 2 * math.cos(0.01)]
    assert turned.tolist() == pytest.approx(expected, abs=1e-6)


def test_rope_depends_on_distance_only():
    config = tiny_config(head_dim=12)
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(i: int, j: int) -> float:
        at = [rope_tables(config, torch.tensor([[p]]), torch.float32) for p in (i, j)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert score(7, 3) == pytest.approx(score(54, 50), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_angles_stay_exact_in_bf16():
    """bf16 has 8 bits: 256 and 257 are the same number. The angle is computed in fp32 and only its cosine rounded."""
    positions = torch.tensor([[255, 256, 257, 2047]])
    exact = rope_tables(tiny_config(), positions, torch.float32)
    for got, want in zip(rope_tables(tiny_config(), positions, torch.bfloat16), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want.bfloat16())
    assert not torch.equal(exact[0][:, :, 1], exact[0][:, :, 2])


def test_rotate_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k, cos, sin = (torch.randn(2, 3, 5, 8) for _ in range(4))
    cos, sin = cos[:, :1], sin[:, :1]
    theirs = apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0])
    assert torch.equal(rotate(q, cos, sin), theirs[0])
    assert torch.equal(rotate(k, cos, sin), theirs[1])


def test_every_module_gives_what_its_twin_gives():
    """The same ids through both; outputs of all modules of the same name are compared, so a fault names its place."""
    theirs, ours = twins(tiny_config(qkv_bias=True, out_bias=True, mlp_bias=True))
    seen: dict[str, list[Tensor]] = {}

    def recorder(key: str):
        return lambda module, args, out: seen.setdefault(key, []).append(out[0] if isinstance(out, tuple) else out)

    for model in (theirs, ours):
        for path, module in model.named_modules():
            module.register_forward_hook(recorder(path.removeprefix("model.")))
    ids = random_ids(2, 11)
    with torch.no_grad():
        theirs(ids, use_cache=False)
        ours(ids)
    compared = {name: pair for name, pair in seen.items() if len(pair) == 2 and torch.is_tensor(pair[0])}
    assert len(compared) >= 2 * 12 + 3, sorted(compared)               # 12 modules a layer, embedding, norm, head
    for name, (expected, got) in compared.items():
        assert_close(got, expected, FP32, name)


# ---------------------------------------------------------------- the whole against transformers

@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_transformers_for_every_rope(name, attention):
    scaling, trained = ROPES[name]
    theirs, ours = twins(tiny_config(rope_scaling=scaling, max_positions=trained))
    ids = random_ids(3, 40)
    assert_close(ours(ids), their_logits(theirs, ids), FP32)


def test_dynamic_rope_goes_back_after_a_long_text():
    theirs, ours = twins(tiny_config(rope_scaling=ROPES["dynamic_long"][0], max_positions=16))
    short = random_ids(2, 10)
    before = ours(short)
    ours(random_ids(2, 40))
    assert torch.equal(ours(short), before)
    assert_close(before, their_logits(theirs, short), FP32)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_for_every_shape(name, attention):
    theirs, ours = twins(tiny_config(**SHAPES[name]))
    for side in ("left", "right"):
        ids, mask = ragged(side)
        real = mask.bool()
        assert_close(ours(ids, mask)[real], their_logits(theirs, ids, mask)[real], FP32, side)


@pytest.mark.parametrize("name", [*SHAPES, "dynamic_long", "yarn"])
def test_logits_equal_transformers_in_float64(name, monkeypatch):
    """In float64 nothing hides in rounding. The frequencies have a test of their own and are shared here: one bit in
    them (theirs are 1 / base^x) would be the largest difference. Norms and angles are fp32 on both sides."""
    monkeypatch.setattr(model_file, "SHORT", 0)                        # the plain products take their softmax in fp32
    scaling, trained = ROPES.get(name, (None, 64))
    config = tiny_config(**SHAPES.get(name, {}), rope_scaling=scaling, max_positions=trained)
    theirs, ours = twins(config, dtype=torch.float64)
    length = 15 if name == "dynamic_long" else 30
    theirs.model.rotary_emb.inv_freq.copy_(rope_frequencies(config)[0])
    ids = random_ids(2, length)
    assert_close(ours(ids), their_logits(theirs, ids), FP64)
    ids, mask = ragged("left")
    real = mask.bool()
    assert_close(ours(ids, mask)[real], their_logits(theirs, ids, mask)[real], FP64)


def test_bias_on_qkv_only_equals_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = tiny_config(qkv_bias=True)
    theirs = randomize(Qwen2ForCausalLM(Qwen2Config(**{
        k: v for k, v in hf_config(config).to_dict().items() if k not in ("attention_bias", "mlp_bias", "model_type",
                                                                         "architectures", "head_dim")}))).eval()
    ours = Transformer(config)
    ours.load_state_dict(hf_state(theirs), strict=True)
    ids = random_ids(2, 13)
    assert_close(ours(ids), their_logits(theirs, ids), FP32)


def test_bf16_is_as_close_to_fp32_as_transformers(attention):
    theirs, ours = twins(tiny_config(), dtype=torch.bfloat16)
    _, exact = twins(tiny_config())
    exact.load_state_dict({k: v.float() for k, v in ours.state_dict().items()})
    ids, mask = ragged("left", lengths=(30, 12, 7))
    real = mask.bool()
    got, want, reference = ours(ids, mask)[real], exact(ids, mask)[real], their_logits(theirs, ids, mask)[real]
    assert got.dtype == torch.bfloat16
    assert_close(got, reference, 0.04)
    mean, their_mean = (float((x.detach().float() - want.detach()).abs().mean()) for x in (got, reference))
    assert mean < 1.1 * their_mean, (mean, their_mean)


def test_state_dict_has_the_public_names():
    for changes in ({}, {"tie_embeddings": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}):
        theirs, ours = twins(tiny_config(**changes))
        assert list(sorted(ours.state_dict())) == sorted(hf_state(theirs))
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in hf_state(theirs).items()}


def test_tied_head_is_one_tensor():
    model = tiny_model(tie_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sum(p is model.embed_tokens.weight for p in model.parameters()) == 1
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)                          # assigning gives each name its own tensor
    model.tie_weights()
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = tiny_model()
    untied.tie_weights()
    assert untied.lm_head.weight is not untied.embed_tokens.weight


def test_fresh_weights_have_the_stated_spread():
    """0.02, and 0.02 / sqrt(2 * 8 layers) = 0.005 for the two matrices that write into the residual stream."""
    model = Transformer(ModelConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_layers=8, num_heads=4,
                                    qkv_bias=True, mlp_bias=True))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.005 if "o_proj" in name or "down_proj" in name else 0.02
            assert float(p.detach().std()) == pytest.approx(std, rel=0.05), name
        else:
            assert bool((p == (0 if name.endswith("bias") else 1)).all()), name


# ---------------------------------------------------------------- padding and packing

def test_what_stands_in_the_padding_does_not_matter(attention):
    model = tiny_model()
    for side in ("left", "right"):
        ids, mask = ragged(side)
        other = torch.where(mask.bool(), ids, (ids + 17) % 97)
        assert torch.equal(model(ids, mask)[mask.bool()], model(other, mask)[mask.bool()])
        assert bool(torch.isfinite(model(ids, mask)).all())            # the pads' own rows too: NaN would spread


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_left_right_and_no_padding_agree(positions, attention):
    model = tiny_model(positions=positions)
    (right_ids, right), (left_ids, left) = ragged("right"), ragged("left")
    left_ids = left_ids.masked_scatter(left.bool(), right_ids[right.bool()])   # the same texts, on the other side
    on_right, on_left = model(right_ids, right), model(left_ids, left)
    assert_close(on_left[left.bool()], on_right[right.bool()], FP32)
    for row, n in enumerate(right.sum(1).tolist()):
        assert_close(model(right_ids[row:row + 1, :n])[0], on_right[row, :n], FP32)
    # A causal model never looks at what follows: on the right the mask may be left out.
    assert_close(model(right_ids)[right.bool()], on_right[right.bool()], FP32)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_gaps_inside_a_row_do_not_matter(positions):
    model = tiny_model(positions=positions)
    ids = random_ids(1, 8)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1]])
    assert_close(model(ids, mask)[mask.bool()], model(ids[mask.bool()][None])[0], FP32)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_packed_rows_equal_separate_rows(positions, attention):
    model = tiny_model(positions=positions)
    ids = random_ids(2, 12)
    mask = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0, 0], [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]])
    logits = model(ids, mask)
    for row in range(2):
        for doc in range(1, int(mask[row].max()) + 1):
            inside = mask[row] == doc
            assert_close(logits[row, inside], model(ids[row, inside][None])[0], FP32, (row, doc))


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_no_gradient_crosses_a_document_border(positions, attention):
    model = tiny_model(positions=positions)
    embedded = []
    model.embed_tokens.register_forward_hook(lambda m, args, out: embedded.append(out.requires_grad_()) or out)
    mask = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    logits = model(random_ids(1, 9), mask)
    grad, = torch.autograd.grad(logits[0, mask[0] == 2].square().sum(), embedded[0])
    assert bool((grad[0, mask[0] != 2] == 0).all())                    # exactly: not one bit of document 1 is seen
    assert bool((grad[0, mask[0] == 2] != 0).any(-1).all())


def test_a_token_never_sees_what_follows(attention):
    model = tiny_model()
    ids = random_ids(1, 10)
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 11) % 97
    for mask in (None, torch.ones_like(ids)):
        assert torch.equal(model(ids, mask)[0, :6], model(other, mask)[0, :6])
        assert not torch.equal(model(ids, mask)[0, 6], model(other, mask)[0, 6])


def test_count_positions_examples_of_the_docstring():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert count_positions(mask).tolist() == [[0, 0, 0, 1, 2]]
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 0, 1, 2, 0, 2]])
    assert count_positions(mask).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 0, 1]]


def positions_by_loop(row: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    out = []
    for doc in row:
        out.append(seen.get(doc, 0) if doc else 0)
        seen[doc] = seen.get(doc, 0) + 1
    return out


@settings(max_examples=150)
@given(st.lists(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=12, max_size=12), min_size=1, max_size=3))
def test_count_positions_equals_a_loop(steps):
    """Each step is a pad (0), the next token of the document (1) or the first of a new one (2)."""
    rows = []
    for row in steps:
        doc, out = 1, []
        for step in row:
            doc += step == 2 and any(out)
            out.append(doc if step else 0)
        rows.append(out)
    assert count_positions(torch.tensor(rows)).tolist() == [positions_by_loop(row) for row in rows]


# ---------------------------------------------------------------- attention and ALiBi

@pytest.mark.parametrize("heads, slopes", [
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
    # 12: the 8 above, then every other slope of 16 heads, 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5
    (12, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 0.7071068, 0.3535534, 0.1767767, 0.0883883]),
    (1, [1 / 256]),
])
def test_alibi_slopes_by_hand(heads, slopes):
    assert alibi_slopes(heads).tolist() == pytest.approx(slopes, rel=1e-6)


def test_alibi_slopes_of_40_heads():
    """Baichuan-13B: 32 slopes 2^(-i/4), i = 1..32, then 8 of the 64-head row, 2^(-1/8), 2^(-3/8), ... 2^(-15/8)."""
    slopes = alibi_slopes(40).tolist()
    assert len(slopes) == 40
    assert slopes[:4] == pytest.approx([0.84089642, 0.70710678, 0.59460356, 0.5], rel=1e-6)
    assert slopes[31] == pytest.approx(1 / 256)
    assert slopes[32:] == pytest.approx([2 ** (-(2 * i + 1) / 8) for i in range(8)], rel=1e-6)


def alibi_by_loop(model: Transformer, ids: list[int]) -> Tensor:
    """Logits of one row, one head and one pair of tokens at a time, in float64."""
    config, x = model.config, model.embed_tokens.weight[ids].double()          # (T, C)
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(layer, x):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * layer.weight.double()

    def linear(layer, x):
        return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())

    for block in model.layers:
        attn, h = block.self_attn, norm(block.input_layernorm, x)
        q, k, v = linear(attn.q_proj, h), linear(attn.k_proj, h), linear(attn.v_proj, h)
        out = torch.zeros(len(ids), H * D, dtype=torch.float64)
        for head in range(H):
            group, slope = head // (H // K), float(alibi_slopes(H)[head])
            for i in range(len(ids)):
                scores = torch.stack([q[i, head * D:(head + 1) * D] @ k[j, group * D:(group + 1) * D] / math.sqrt(D)
                                      - slope * (i - j) for j in range(i + 1)])
                out[i, head * D:(head + 1) * D] = scores.softmax(0) @ v[:i + 1, group * D:(group + 1) * D]
        x = x + linear(attn.o_proj, out)
        mlp, h = block.mlp, norm(block.post_attention_layernorm, x)
        x = x + linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h))
    return linear(model.lm_head, norm(model.norm, x))


@pytest.mark.parametrize("heads, kv", [(4, 2), (6, 6), (6, 1)])                # 6 heads: no power of two
@torch.no_grad()
def test_alibi_equals_a_loop(heads, kv, attention):
    model = tiny_model(positions="alibi", num_heads=heads, num_kv_heads=kv)
    ids = random_ids(1, 9)
    reference = alibi_by_loop(model, ids[0].tolist())
    assert_close(model(ids)[0], reference, FP32)
    assert error(model(ids)[0], tiny_model(positions="none", num_heads=heads, num_kv_heads=kv)(ids)[0]) > 0.01
    padded = torch.cat((torch.full((1, 3), 5), ids[:, :4], torch.full((1, 2), 6), ids[:, 4:]), 1)
    mask = torch.tensor([[0] * 3 + [1] * 4 + [0] * 2 + [1] * 5])       # distance counts real tokens, not columns
    assert_close(model(padded, mask)[mask.bool()], reference, FP32)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("per_head", [False, True])
def test_attention_equals_a_loop(kv, per_head, attention):
    """attend with a bias, for whole rows and for one new token, against one query, one head and one row at a time."""
    B, H, T, D = 3, 4, 5, 8
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, kv, T, D), torch.randn(B, kv, T, D)
    bias = torch.randn(B, H if per_head else 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -INF)
    bias[0, :, 2:, 1] = -INF                                                   # in row 0 nobody later sees key 1
    expected = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // kv)
            for t in range(T):
                scores = k[b, g].double() @ q[b, h, t].double() / math.sqrt(D) + bias[b, h if per_head else 0, t]
                expected[b, h, t] = scores.softmax(0) @ v[b, g].double()
    assert_close(attend(q, k, v, bias), expected, 1e-5)
    assert_close(attend(q[:, :, -1:], k, v, bias[:, :, -1:]), expected[:, :, -1:], 1e-5)
    causal = torch.zeros(1, 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -INF)
    assert_close(attend(q, k, v, None), attend(q, k, v, causal.expand(B, 1, T, T)), 1e-5)


# ---------------------------------------------------------------- the cache

@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
@pytest.mark.parametrize("kv", [1, 2, 4])
@torch.no_grad()
def test_cached_logits_equal_a_full_forward(positions, kv, attention):
    """A left-padded batch fed as 5 + 1 + 1 + 3 + 1 + 1 tokens gives what one forward gives."""
    model = tiny_model(positions=positions, num_kv_heads=kv)
    ids, mask = ragged("left", lengths=(12, 8, 9))                     # the first 5 columns hold pads and tokens
    full = model(ids, mask)
    cache, at, parts = Cache(model.config, 3, 12, "cpu", torch.float32), 0, []
    for n in (5, 1, 1, 3, 1, 1):
        parts.append(model.lm_head(model.hidden(ids[:, at:at + n], mask[:, at:at + n], cache)))
        at += n
        assert cache.length == at
    real = mask.bool()
    assert_close(torch.cat(parts, 1)[real], full[real], FP32)


@torch.no_grad()
def test_cache_keeps_only_the_rows_it_is_told():
    model = tiny_model()
    ids, mask = ragged("left", lengths=(6, 3, 5))
    cache = Cache(model.config, 3, 7, "cpu", torch.float32)
    model.hidden(ids, mask, cache)
    cache.keep(torch.tensor([True, False, True]))
    new = torch.tensor([[11], [12]])
    got = model.hidden(new, None, cache)[:, 0]
    full = model.hidden(torch.cat((ids[[0, 2]], new), 1), F.pad(mask[[0, 2]], (0, 1), value=1))
    assert_close(got, full[:, -1], FP32)


# ---------------------------------------------------------------- drawing a token

def test_left_pad_examples():
    ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    new_ids, new_mask = left_pad(ids, mask)
    assert new_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert new_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    new_ids, new_mask = left_pad(torch.tensor([[3, 5, 4, 6]]), torch.tensor([[0, 1, 0, 2]]))   # a gap, document numbers
    assert new_ids.tolist() == [[3, 4, 5, 6]]
    assert new_mask.tolist() == [[0, 0, 1, 1]]
    assert left_pad(ids, None)[1].tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(AssertionError, match="no real token"):
        left_pad(ids, torch.tensor([[1, 1, 0], [0, 0, 0]]))


LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0, 2.5])
# Their probabilities are 0.062 0.459 0.008 0.169 0.023 0.279; sorted that is tokens 1 5 3 0 4 2, and the sums are
# 0.459 0.738 0.907 0.969 0.992 1.


def draw(noise: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    return sample(LOGITS.expand(len(noise), -1), noise, temperature, top_k, top_p)[0]


def even(n: int = 20000) -> Tensor:
    """Noise spread evenly over [0, 1): every token then appears exactly as often as its probability says."""
    return torch.arange(n) / n


@pytest.mark.parametrize("settings_, kept", [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"top_k": 3}, [1, 3, 5]),
    ({"top_k": 1}, [1]),
    ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
    ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
    ({"top_k": 0}, [0, 1, 2, 3, 4, 5]),    # off, as other tools spell it
    ({"top_p": 0.45}, [1]),                # token 1 alone has 0.459
    ({"top_p": 0.47}, [1, 5]),             # the token that crosses the line stays
    ({"top_p": 0.9}, [1, 3, 5]),
    ({"top_p": 0.993}, [0, 1, 2, 3, 4, 5]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
    ({"top_p": 0.0}, [1]),                 # the best token always stays
    ({"top_k": 2, "top_p": 0.6}, [1]),     # top_p counts what top_k left: 0.459 / 0.738 = 0.62
    ({"temperature": 0.5, "top_p": 0.65}, [1]),            # the temperature comes first: token 1 has 0.656 now
    ({"temperature": 2.0, "top_p": 0.65}, [1, 3, 5]),      # 0.321 + 0.250 = 0.572
])
def test_tokens_that_can_be_drawn_and_how_often(settings_, kept):
    drawn = draw(even(), **settings_)
    assert drawn.unique().tolist() == kept
    probs = (LOGITS.double() / settings_.get("temperature", 1.0)).softmax(0)
    probs = torch.zeros(6, dtype=torch.float64).index_copy(0, torch.tensor(kept), probs[kept])
    counts = drawn.bincount(minlength=6) / len(drawn)
    assert float((counts - probs / probs.sum()).abs().max()) < 2e-4


def test_top_p_keeps_a_token_that_starts_exactly_at_the_line_out():
    """Four tokens of 1/4: after two of them exactly 0.5 is reached, the third is out."""
    logits = torch.zeros(1000, 4)
    assert len(sample(logits, even(1000), 1.0, None, 0.5)[0].unique()) == 2


def test_frequencies_are_the_softmax():
    """Chi-square with 5 degrees of freedom: 25.7 is passed once in ten thousand, and the seed is fixed."""
    for temperature in (1.0, 0.7):
        drawn = draw(torch.rand(50000, generator=torch.Generator().manual_seed(4)), temperature)
        expected = (LOGITS.double() / temperature).softmax(0) * 50000
        assert float(((drawn.bincount(minlength=6) - expected).square() / expected).sum()) < 25.7


def test_greedy_is_the_best_token_whatever_the_settings():
    logits = torch.randn(5, 50)
    assert torch.equal(sample(logits, None, 0.0)[0], logits.argmax(-1))
    assert torch.equal(sample(logits.bfloat16(), None, 1.0, 3, 0.5)[0], logits.bfloat16().float().argmax(-1))


def test_a_row_depends_on_its_own_noise_only():
    logits, noise = torch.randn(6, 40), torch.rand(6)
    for top_k, top_p in ((None, None), (5, None), (None, 0.7)):
        together = sample(logits, noise, 0.8, top_k, top_p)[0]
        alone = [int(sample(logits[i:i + 1], noise[i:i + 1], 0.8, top_k, top_p)[0]) for i in range(6)]
        assert together.tolist() == alone
    changed = noise.clone()
    changed[1:] = torch.rand(5)
    assert sample(logits, changed, 0.8)[0][0] == sample(logits, noise, 0.8)[0][0]


def test_log_probabilities_are_those_of_the_distribution_drawn_from():
    logits, noise = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 2, torch.linspace(0, 0.99, 8)
    settings_ = ((1.0, None, None), (0.7, None, None), (1.3, 5, None), (0.8, None, 0.6), (1.0, 9, 0.7))
    for temperature, top_k, top_p in settings_:
        new, logp = sample(logits, noise, temperature, top_k, top_p)
        for row in range(8):
            order = logits[row].double().argsort(descending=True)
            probs = (logits[row].double() / temperature)[order].softmax(0)
            left = torch.ones(40, dtype=torch.bool) if top_k is None else torch.arange(40) < top_k
            probs = probs * left / probs[left].sum()
            if top_p is not None:
                probs[probs.cumsum(0) - probs >= top_p] = 0
            chosen = float((probs / probs.sum())[order == new[row]].log())
            assert float(logp[row]) == pytest.approx(chosen, abs=1e-5)
    new, logp = sample(logits, None, 0.0)                              # greedy reports what the model itself says
    assert torch.allclose(logp, logits.log_softmax(-1).gather(1, new[:, None])[:, 0], atol=1e-5)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([-1e4, 0.0, 0.1, 3.0]), min_size=2, max_size=9).filter(lambda row: max(row) >= 0),
       st.sampled_from([0.0, 2 ** -24, 0.1, 0.5, 0.999999, 1 - 2 ** -24, 1.0]))
def test_a_token_without_probability_is_never_drawn(row, noise):
    """-1e4 has probability 0 in fp32. The ends of the interval are where a search in a cumulative sum slips off."""
    token, logp = (float(x) for x in sample(torch.tensor([row]), torch.tensor([noise]), 1.0))
    token = int(token)
    assert 0 <= token < len(row)
    assert row[token] >= 0 and math.isfinite(logp)
    if noise == 0:
        assert token == next(i for i, x in enumerate(row) if x >= 0)
    if noise == 1:
        assert token == max(i for i, x in enumerate(row) if x >= 0)


def test_a_large_vocabulary_ends_inside():
    """128,000 equal tokens: the fp32 sum is not exactly 1, the last draws must still be ids."""
    drawn = sample(torch.zeros(4, 128000), torch.tensor([0.0, 0.5, 1 - 2 ** -24, 1.0]), 1.0)[0]
    assert drawn[0] == 0 and abs(int(drawn[1]) - 64000) < 64
    assert all(127000 < int(token) < 128000 for token in drawn[2:])


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("noise", [None, torch.tensor([0.3, 0.3, 0.3])])
def test_logits_that_are_not_finite_stop_and_name_the_row(value, noise):
    logits = torch.randn(3, 7)
    logits[1, 2] = value
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        sample(logits, noise, 1.0)


# ---------------------------------------------------------------- generate

def greedy_by_loop(model: Transformer, ids: Tensor, n: int) -> Tensor:
    """Without cache, padding or batching: the whole text again for every token."""
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids[:, -n:]


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"positions": "alibi"},
                                     {"rope_scaling": ROPES["llama3"][0]}, {"tie_embeddings": True, "qkv_bias": True}])
@torch.no_grad()
def test_greedy_with_cache_equals_greedy_without(changes, attention):
    model = tiny_model(**changes)
    for side in ("left", "right"):
        ids, mask = ragged(side)
        new = model.generate(ids, 10, mask, temperature=0.0)
        for row in range(len(ids)):
            expected = greedy_by_loop(model, ids[row, mask[row].bool()][None], 10)
            assert torch.equal(new[row:row + 1], expected), (side, row)


@pytest.mark.parametrize("name", ["default", "dynamic_long", "yarn"])
def test_greedy_equals_transformers_generate(name):
    """dynamic_long crosses the trained length in the middle: keys keep the angle of the moment they were written."""
    scaling, trained = ROPES[name]
    theirs, ours = twins(tiny_config(rope_scaling=scaling, max_positions=trained))
    ids, mask = ragged("left")
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)[:, ids.shape[1]:]
    assert torch.equal(ours.generate(ids, 14, mask, temperature=0.0), expected)


def cut(out: Tensor, ends: set[int], pad: int) -> list[list[int]]:
    """What generate must return where `out` is the text without end tokens: cut after the first end, then pads."""
    rows = [row[:next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in out.tolist()]
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("batch", [6, 24])                             # 24: one ended row in ten stays in the cache
def test_rows_that_ended_are_padded_and_stop_costing(batch):
    model = tiny_model()
    ids, mask = ragged("left", lengths=tuple(1 + i % 7 for i in range(batch)))
    free = model.generate(ids, 16, mask, generator=torch.Generator().manual_seed(3))
    assert free.shape == (batch, 16)
    counts = free.flatten().bincount(minlength=97)
    ends = {int(t) for t in counts.argsort(descending=True)[:8]}               # eight end tokens that do occur
    rows_forward = []
    model.layers[0].register_forward_pre_hook(lambda module, args: rows_forward.append(len(args[0])))
    model.reads_in_order = lambda: False                                       # no pass for common beginnings
    got = model.generate(ids, 16, mask, eos_ids=ends, generator=torch.Generator().manual_seed(3), pad_id=96)
    expected = cut(free, ends, 96)
    assert got.tolist() == expected                                            # the others are not disturbed by it
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), 16) for row in free.tolist()]
    alive = [sum(n > t for n in lengths) for t in range(got.shape[1])]         # rows that still need token t
    assert 1 < min(lengths) + 1 < max(lengths) and len(rows_forward) == max(lengths)
    if batch == 6:
        assert rows_forward == alive
    for rows, need in zip(rows_forward, alive, strict=True):
        assert need <= rows <= need / 0.9


def test_generation_stops_when_all_rows_ended():
    model = tiny_model()
    ids = random_ids(3, 5)
    first = model.generate(ids, 1, temperature=0.0)[:, 0].tolist()
    calls = []
    model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    out = model.generate(ids, 50, temperature=0.0, eos_ids=first)
    assert out.tolist() == [[t] for t in first]
    assert len(calls) == 1
    assert model.generate(ids, 3, temperature=0.0, eos_ids=[]).shape == (3, 3)


def test_the_same_seed_gives_the_same_text():
    model = tiny_model()
    ids, mask = ragged("left")
    runs = [model.generate(ids, 12, mask, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(5)
    a = model.generate(ids, 12, mask)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, 12, mask), a)                       # without a generator the global one


def test_a_row_gives_the_same_text_in_any_company():
    model = tiny_model()
    ids, mask = ragged("left")
    other, other_mask = ids.clone(), mask.clone()
    other[1:] = random_ids(3, 12, seed=9)
    other_mask[1:] = 1
    a, b = (model.generate(i, 12, m, temperature=0.9, top_k=20, generator=torch.Generator().manual_seed(1))
            for i, m in ((ids, mask), (other, other_mask)))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1:], b[1:])
    # Also when the others end at once.
    ends = set(b[1:, 0].tolist()) - set(b[0].tolist())
    assert ends
    c = model.generate(other, 12, other_mask, temperature=0.9, top_k=20, eos_ids=ends,
                       generator=torch.Generator().manual_seed(1))
    assert c[0].tolist() == b[0, :c.shape[1]].tolist()


def test_right_padded_prompts_equal_left_padded():
    model = tiny_model()
    (right_ids, right), (left_ids, left) = ragged("right"), ragged("left")
    left_ids = left_ids.masked_scatter(left.bool(), right_ids[right.bool()])
    a, b = (model.generate(i, 9, m, generator=torch.Generator().manual_seed(2))
            for i, m in ((right_ids, right), (left_ids, left)))
    assert torch.equal(a, b)


def test_small_prompts_and_limits():
    model = tiny_model()
    one = torch.tensor([[7]])
    assert torch.equal(model.generate(one, 6, temperature=0.0), greedy_by_loop(model, one, 6))
    assert model.generate(one, 1, temperature=0.0).shape == (1, 1)
    assert torch.equal(model.generate(one, 1, temperature=0.0), model.generate(one, 6, temperature=0.0)[:, :1])
    with pytest.raises(AssertionError, match="no real token"):
        model.generate(torch.tensor([[7, 8], [0, 0]]), 4, torch.tensor([[1, 1], [0, 0]]))


def test_on_token_streams_what_is_returned():
    model = tiny_model()
    ids = random_ids(3, 4)
    free = model.generate(ids, 8, temperature=0.0)
    steps = []
    out = model.generate(ids, 8, temperature=0.0, eos_ids=[int(free[0, 2])], pad_id=96,
                         on_token=lambda new: steps.append(new.clone()))
    assert torch.equal(torch.stack(steps, 1), out)


@torch.no_grad()
def test_log_probabilities_of_generate_equal_a_full_forward():
    """What sampling reports is what scoring the finished text gives, at the same temperature; 0 behind the end."""
    model = tiny_model()
    ids, mask = ragged("left", lengths=(9, 4, 1, 12, 6))
    free = model.generate(ids, 8, mask, temperature=0.7, generator=torch.Generator().manual_seed(3))
    ends = [int(free[0, 1]), int(free[2, 4])]
    steps: list[Tensor] = []
    new = model.generate(ids, 8, mask, temperature=0.7, eos_ids=ends, pad_id=96, logprobs=steps,
                         generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([[t not in ends for t in row] for row in new.tolist()]).long().cumprod(1)
    chosen = F.pad(chosen[:, :-1], (1, 0), value=1)                            # 1 up to and with the end token
    assert 0 < int((chosen == 0).sum())
    logits = model(torch.cat((ids, new), 1), torch.cat((mask, chosen), 1))[:, ids.shape[1] - 1:-1] / 0.7
    expected = logits.log_softmax(-1).gather(2, new[:, :, None])[:, :, 0] * chosen
    assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-4)


def test_shared_examples():
    ids, mask = torch.tensor([[0, 5, 6, 7], [0, 5, 6, 8], [5, 6, 9, 9]]), torch.ones(3, 4, dtype=torch.int64)
    mask[:2, 0] = 0
    n, rows, which = shared(ids, mask)
    assert n == 3 and rows.tolist() == [1, 2] and which.tolist() == [0, 0, 1]
    assert shared(ids[:1], mask[:1])[0] in (0, 3)                              # one row: nothing to save either way
    n, rows, which = shared(torch.tensor([[5, 6, 7]] * 4), torch.ones(4, 3, dtype=torch.int64))
    assert n == 2 and rows.tolist() == [3] and which.tolist() == [0] * 4       # at least one column is left
    assert shared(torch.tensor([[4, 5, 6], [3, 5, 6]]), torch.ones(2, 3, dtype=torch.int64))[0] == 0
    ids = torch.tensor([[7, 5, 6], [0, 5, 6]])                                 # a pad is no token, whatever it holds
    assert shared(ids, torch.tensor([[0, 1, 1], [0, 1, 1]]))[0] == 2


SHARING = {"rope": {}, "alibi": {"positions": "alibi"}, "learned": {"positions": "learned"},
           "yarn": {"rope_scaling": ROPES["yarn"][0]}, "partial": {"rope_dim": 8}, "window": {"window": 12}}
NOT_SHARING = {"dynamic": {"rope_scaling": ROPES["dynamic_long"][0], "max_positions": 8},
               "glm": {"positions": "rope_2d", "prefix_ids": (90, 91)}}


@pytest.mark.parametrize("name", [*SHARING, *NOT_SHARING])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_beginning_that_all_prompts_share_is_read_once(name, side):
    """Nine tokens that all begin with, prompts of 15, 13, 15 and 13 tokens: the tokens are drawn with the
    probabilities that one forward over the whole text gives, and where it is allowed the model reads less: of the
    first nine columns (nine tokens, or two pads and seven) there are two kinds."""
    model = tiny_model(**(SHARING | NOT_SHARING)[name])
    ids, mask = ragged(side, lengths=(15, 13, 15, 13))
    for row, real in zip(ids, mask.bool()):
        row[real.nonzero()[:9, 0]] = torch.arange(20, 29)
    read, hidden, drawn = [], model.hidden, []
    model.hidden = lambda new, *rest: (read.append(new.numel()), hidden(new, *rest))[1]
    new = model.generate(ids, 7, mask, generator=torch.Generator().manual_seed(3), logprobs=drawn)
    del model.hidden
    assert sum(read[:-6]) == (2 * 9 + 4 * 6 if name in SHARING else 60)
    if name == "dynamic":              # the angles of a key are those of the length at which it was read
        return
    ids, mask = left_pad(ids, mask)
    logp = model(torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1))[:, -8:-1].log_softmax(-1)
    assert_close(torch.stack(drawn, 1), logp.gather(2, new[:, :, None])[:, :, 0], FP32)


@pytest.mark.parametrize("length", [30, 290])                              # below and above model.SHORT
def test_sampling_rounds_as_scoring_does(length):
    """In bf16 another order of the same sums changes log-probabilities by 0.01. What is sampled has to be what is
    scored: reading beginnings once, packed matrices and blocks of attention leave every rounding where it was."""
    model = tiny_model(max_positions=512).bfloat16()
    ids, mask = ragged("left", lengths=(length, length - 2, length, length - 9))
    for row, real in zip(ids, mask.bool()):
        row[real.nonzero()[:length // 2, 0]] = torch.arange(length // 2) % 90
    drawn = []
    with packed(model):
        new = model.generate(ids, 20, mask, generator=torch.Generator().manual_seed(3), logprobs=drawn)
    with torch.no_grad():
        logits = model(torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1))[:, -21:-1].float()
    gap = (torch.stack(drawn, 1) - logits.log_softmax(-1).gather(2, new[:, :, None])[:, :, 0]).abs()
    assert float(gap.mean()) < 1e-4, (float(gap.mean()), float(gap.max()))


@needs_packing
def test_a_packed_model_is_the_same_in_bf16():
    """The bits of every linear with and without a bias, of the head too; undone afterwards; in fp32 nothing happens."""
    model = tiny_model(qkv_bias=True, mlp_bias=True)
    with packed(model):
        assert not any("forward" in vars(m) for m in model.modules())
    model.bfloat16()
    ids, mask = ragged("left")
    with torch.no_grad():
        expected = model(ids, mask)
        text = model.generate(ids, 3, mask, temperature=0)
        with packed(model), packed(model):
            inside = [m for m in model.modules() if "forward" in vars(m)]
            assert len(inside) == 7 * model.config.num_layers + 1
            assert torch.equal(model(ids, mask), expected)
            assert torch.equal(model.generate(ids, 3, mask, temperature=0), text)
        assert not any("forward" in vars(m) for m in model.modules())
        assert torch.equal(model.generate(ids, 20, mask, temperature=0)[:, :3], text)          # packs by itself


def test_generate_leaves_no_graph_and_passes_settings_on():
    model = tiny_model()
    ids = random_ids(4, 4)
    assert not model.generate(ids, 2).requires_grad
    greedy = model.generate(ids, 8, temperature=0.0)
    assert torch.equal(model.generate(ids, 8, temperature=1.0, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 8, temperature=1.0, top_p=1e-6), greedy)
    seeded = torch.Generator().manual_seed(0)                # two best tokens may be as close as the temperature is low
    assert torch.equal(model.generate(ids, 8, temperature=1e-5, generator=seeded), greedy)
    assert not torch.equal(model.generate(ids, 8, temperature=5.0, generator=seeded), greedy)


def test_broken_weights_stop_generation():
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(random_ids(2, 3), 4, temperature=0.0)


# ---------------------------------------------------------------- gradients and errors

def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    ids, mask = ragged("right")
    grads = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        F.cross_entropy(model(ids, mask)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert bool(grad.any()), name
        assert_close(grads[1][name], grad, 1e-5, name)


def test_gradient_checkpointing_keeps_less():
    """What autograd saves between forward and backward shrinks by more than half."""
    def kept_numbers(checkpointing: bool) -> int:
        model, kept = tiny_model(num_layers=6), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(random_ids(2, 20))
        return sum(kept)

    assert kept_numbers(True) < kept_numbers(False) / 2


@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"rope_type": "longer", "factor": 2.0}}, "unknown rope type 'longer'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks 'factor'"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' lacks 'factor'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks 'factor'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' lacks 'low_freq_factor'"),
    ({"activation": "swish2"}, "unknown activation 'swish2'"),
    ({"positions": "absolute"}, "unknown positions 'absolute'"),
    ({"num_kv_heads": 3}, "4 heads cannot share 3"),
])
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_config_fills_in_what_follows_from_the_rest():
    config = ModelConfig(hidden_size=64, num_heads=8)
    assert (config.num_kv_heads, config.head_dim) == (8, 8)
    assert replace(config, head_dim=16).head_dim == 16
    old = tiny_config(rope_scaling={"type": "linear", "factor": 2.0})          # how configs of 2023 spell it
    new = tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert torch.equal(rope_frequencies(old)[0], rope_frequencies(new)[0])


@pytest.mark.parametrize("vocabulary", [97, 256, 257, 1000])
def test_the_sampler_in_two_steps_draws_what_one_running_sum_draws(vocabulary):
    """A vocabulary of one block, of exactly one, of one and a single token, of several: the token is the first whose
    running sum of probabilities exceeds the noise, in float64; the log-probability is its own."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(500, vocabulary, generator=generator)
    noise = torch.rand(500, generator=generator)
    new, logp = sample(logits, noise, 0.7)
    exact = (logits.double() / 0.7).log_softmax(-1)
    heights = exact.exp().cumsum(-1).gather(1, new[:, None])[:, 0]
    chosen = exact.gather(1, new[:, None])[:, 0]
    assert bool((heights > noise - 1e-5).all()) and bool((heights - chosen.exp() <= noise + 1e-5).all())
    assert float((logp - chosen).abs().max()) < 1e-4
    assert len(new.unique()) > min(vocabulary, 100) / 2
