"""Generation in steps of one shape: the text of the plain loop, and steps that a CUDA graph can record. No card is
needed: `graph=True` runs the same function on a CPU, and what a recording forbids is looked for there."""
import math

import pytest
import torch
from conftest import assert_close, random_ids, randomize, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import model as model_file
import sampling
from common import UserError
from model import Transformer

GLM = {"positions": "rope_2d", "prefix_ids": (90, 91), "num_kv_heads": 4, "vocab_size": 97}
CASES = {
    "llama": {}, "multi-query": {"num_kv_heads": 1}, "bloom": {"positions": "alibi", "norm": "layer", "glu": False,
                                                              "embed_norm": True},
    "falcon-rw": {"positions": "alibi", "alibi_rounded": True}, "gpt-2": {"positions": "learned", "norm": "layer"},
    "no positions": {"positions": "none"}, "a window": {"window": 5},
    "gemma": {"attention_softcap": 5.0, "final_softcap": 8.0, "window": 6, "full_layers": (1,), "embed_scale": 7.0,
              "block": "sandwich", "rope_theta_local": 100.0, "tie_embeddings": True},
    "qwen 3": {"qk_norm": "head", "rope_dim": 6, "head_bias": True}, "neox": {"parallel": 2, "norm": "layer"},
    "pangu": {"top_query": "after", "positions": "learned"}, "smollm 3": {"no_rope_layers": (1,)},
    "llama 3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "chatglm": GLM, "glm-10b": {**GLM, "positions": "learned_2d", "prefix_ids": (90, 91, 92)}}


def prompts(rows: int = 5, width: int = 9, glm: bool = False):
    """Rows of 9, 4, 1, 7, ... real tokens, padded on the left."""
    ids = random_ids(rows, width, high=90)
    lengths = [(width, 4, 2, 7, 5)[i % 5] for i in range(rows)]
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    if glm:                                                # the hole and <sop> at the end of every prompt
        ids[:, -2], ids[:, -1] = 91, 90
    return ids, mask


def both(model: Transformer, ids, mask, n: int, seed: int = 3, **settings):
    """(text, log-probabilities, what the generator draws next) without and with graph."""
    out = []
    for graph in (False, True):
        generator, logprobs = torch.Generator().manual_seed(seed), []
        new = model.generate(ids, n, mask, generator=generator, logprobs=logprobs, graph=graph, **settings)
        out.append((new, torch.stack(logprobs, 1), torch.rand(3, generator=generator)))
    return out


def assert_same(pair) -> None:
    (plain, logps, rest), (static, static_logps, static_rest) = pair
    assert torch.equal(plain, static)
    assert torch.equal(rest, static_rest)                  # one generator serves many calls: it must stand where it did
    assert_close(static_logps, logps, 1e-5)


# ---------------------------------------------------------------- the same text

@pytest.mark.parametrize("name", CASES)
def test_every_family_writes_the_same_text(name):
    model = tiny_model(**CASES[name])
    ids, mask = prompts(glm="prefix_ids" in CASES[name])
    assert_same(both(model, ids, mask, 37))                # three rounds, the last of four tokens
    assert_same(both(model, ids, None if name == "llama" else mask, 21, temperature=0.0))


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"top_p": 0.6}, {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 24])
def test_every_way_to_draw_and_rows_that_end_at_different_times(settings, rows):
    model = tiny_model()
    ids, mask = prompts(rows)
    free = model.generate(ids, 40, mask, generator=torch.Generator().manual_seed(3), **settings)
    common = free.flatten().bincount(minlength=97).argsort(descending=True)
    for ends in ({int(t) for t in common[:4]}, {int(free[0, 20])}, set()):
        pair = both(model, ids, mask, 40, eos_ids=ends, pad_id=96, **settings)
        assert_same(pair)
        if len(ends) == 4 and rows == 24 and settings.get("temperature"):
            assert 1 < pair[0][0].shape[1] and 0 < int((pair[0][0] == 96).sum())


@pytest.mark.parametrize("n", [0, 1, 2, 16, 17, 18, 33])
def test_lengths_at_the_borders_of_a_round(n):
    model = tiny_model()
    ids, mask = prompts()
    a, b = (model.generate(ids, n, mask, temperature=0.0, graph=graph) for graph in (False, True))
    assert a.shape == (5, n) and torch.equal(a, b)


def test_the_end_at_every_place_of_a_round():
    """All rows end after k tokens: the text has k tokens, and the generator is where k draws leave it."""
    model = tiny_model()
    ids, _ = prompts(1)
    free = model.generate(ids, 36, generator=torch.Generator().manual_seed(5))[0]
    places = [k for k in (0, 1, 14, 15, 16, 17, 30, 31, 32, 33) if free[k] not in free[:k]]
    assert len(places) > 5
    for k in places:
        pair = both(model, ids, None, 36, seed=5, eos_ids=[int(free[k])])
        assert pair[0][0].shape == (1, k + 1)
        assert_same(pair)


def test_with_an_adapter_in_use_and_merged():
    model = tiny_model()
    lora.apply(model, 4, 8.0, name="policy")
    ids, mask = prompts()
    base = both(model, ids, mask, 20)
    randomize(model, 7)
    for how in (lora.use, lora.merged):
        with how(model, "policy"):
            pair = both(model, ids, mask, 20)
        assert_same(pair)
        assert not torch.equal(pair[1][0], base[1][0])


def test_in_bf16():
    model = tiny_model().bfloat16()
    ids, mask = prompts()
    (plain, logps, _), (static, static_logps, _) = both(model, ids, mask, 20)
    assert torch.equal(plain, static) and float((static_logps - logps).abs().max()) < 0.05


def test_without_a_generator_torch_s_own_is_used():
    model = tiny_model()
    ids, mask = prompts()
    out = []
    for graph in (False, True):
        torch.manual_seed(11)
        new = model.generate(ids, 20, mask, eos_ids=[5], graph=graph)
        out.append((new, torch.rand(2)))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])


def test_on_token_sees_each_token_once_and_may_stop_the_text():
    model = tiny_model()
    ids, _ = prompts(1)
    free = model.generate(ids, 24, temperature=0.0)[0]
    end = next(int(t) for k, t in enumerate(free) if k > 4 and t not in free[:k])
    for ends in ([], [end]):
        plain, static = [], []
        for graph, seen in ((False, plain), (True, static)):
            out = model.generate(ids, 24, temperature=0.0, eos_ids=ends, graph=graph,
                                 on_token=lambda new, seen=seen: seen.append(int(new)))
            assert out[0].tolist() == seen
        assert plain == static

    class Enough(Exception):
        pass

    def stop(new):
        steps.append(int(new))
        if len(steps) == 5:
            raise Enough

    states = []
    for graph in (False, True):                            # chat.py leaves like this: its next answer must not change
        steps, generator = [], torch.Generator().manual_seed(1)
        with pytest.raises(Enough):
            model.generate(ids, 24, generator=generator, on_token=stop, graph=graph)
        states.append(torch.rand(2, generator=generator))
    assert torch.equal(*states)


# ---------------------------------------------------------------- what a recording forbids

class Recorder(TorchDispatchMode):
    """The operations of a step with the shapes of their inputs. A number that the host asks for ends the test, and so
    does a new tensor whose device nobody named: on a GPU it would be a copy from the host. (It is born on the meta
    device here.)"""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique",
                                                 "equal.default", "repeat_interleave.Tensor")), name
        if name.startswith("aten::index.") or name.startswith("aten::_index_put"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), "a boolean index asks for its count"
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if any(x.is_meta for x in tensors):
            assert all(x.dim() == 0 or not x.is_meta for x in tensors), f"{name} has a tensor of no device"
        self.calls.append((name, *(tuple(x.shape) for x in tensors)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_nothing_and_is_the_same_every_time(name, settings, monkeypatch):
    """A recorded step is replayed with the addresses, shapes and constants of its first run."""
    steps = []

    class Watched(sampling.Replay):
        def __call__(self):
            with Recorder() as recorder, torch.device("meta"):
                self.step()
            steps.append(recorder.calls)
    monkeypatch.setattr(sampling, "Replay", Watched)
    model = tiny_model(**{**CASES[name], "embed_scale": 1.0})      # a factor of the host's may be anywhere
    lora.apply(model, 4, 8.0, name="policy")
    ids, mask = prompts(glm="prefix_ids" in CASES[name])
    with lora.use(model, "policy"):
        new = model.generate(ids, 37, mask, eos_ids=(5, 9), graph=True, **settings)
    assert len(steps) >= 32 or new.shape[1] < 37
    assert len(steps[0]) > 50 and all(step == steps[0] for step in steps)


def test_the_watch_sees_what_it_should(monkeypatch):
    x, keep = torch.ones(3), torch.ones(3, dtype=torch.bool)
    for bad in (lambda: int(x.sum()), lambda: x[keep], lambda: x + torch.arange(3)):
        with pytest.raises((AssertionError, RuntimeError)), Recorder(), torch.device("meta"):
            bad()


def test_memory_stays_where_it_is(monkeypatch):
    """The layout of each round is written into the memory of the first round's."""
    seen = []
    real = sampling.each

    def each(function, first, *others):
        out = real(function, first, *others)
        if isinstance(first, sampling.Layout) and function in (torch.clone, sampling.refill):
            places = []
            real(lambda x: places.append(x.data_ptr()), out)
            seen.append(places)
        return out
    monkeypatch.setattr(sampling, "each", each)
    model = tiny_model(window=5)
    model.generate(*prompts()[:1], 40, graph=True)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and len(seen[0]) > 5


# ---------------------------------------------------------------- refusals and errors

def test_rope_that_changes_with_the_length_is_refused_where_it_would():
    ids = random_ids(2, 12)
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 16}
    for scaling in ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}, longrope):
        model = tiny_model(rope_scaling=scaling)
        with pytest.raises(UserError, match="cross the 16"):
            model.generate(ids, 8, graph=True)
        assert_same(both(model, ids, None, 4))             # up to there it is a RoPE like any other
    assert_same(both(tiny_model(rope_scaling=longrope), random_ids(2, 20), None, 18))          # and behind it again


def test_other_models_say_that_they_cannot():
    from rwkv import RWKV, RWKVConfig
    model = RWKV(RWKVConfig(vocab_size=97, hidden_size=32, num_layers=2))
    with pytest.raises(UserError, match="without --graph"):
        model.generate(random_ids(1, 4), 3, graph=True)


def test_broken_weights_stop_generation():
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            model.generate(random_ids(2, 3), 4, temperature=temperature, graph=True)


def test_weights_that_break_on_the_way_name_the_row():
    """Only row 1 reads token 8, whose embedding is broken."""
    model = Transformer(tiny_config())
    randomize(model).eval()
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    model.embed_tokens.weight.data[8] = math.nan
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        model.generate(ids, 4, temperature=0.0, graph=True)


def test_the_library_s_attention_on_the_way(monkeypatch):
    monkeypatch.setattr(model_file, "SHORT", 0)
    assert_same(both(tiny_model(), *prompts(), 20))


def test_a_mac_draws_from_its_own_generator(monkeypatch):
    """noise.uniform_ of one device refuses another's generator."""
    mine = torch.Generator()
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: mine)
    assert sampling.default_generator(torch.device("mps")) is mine
    assert sampling.default_generator(torch.device("cpu")) is torch.default_generator
