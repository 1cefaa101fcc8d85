"""The memory estimate: against arithmetic by hand for 7B models, and against what torch allocates for a small one."""
import contextlib
import dataclasses
import resource

import pytest
import torch
from conftest import tiny_config
from torch import nn

import common
import lora
import memory
import ppo
import reward as reward_stage
import sampling
import sft
from model import ModelConfig, Transformer
from rwkv import RWKVConfig
from t5 import T5Config

LLAMA2_7B = ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32)
MISTRAL_7B = dataclasses.replace(LLAMA2_7B, intermediate_size=14336, num_kv_heads=8)
LLAMA3_8B = dataclasses.replace(MISTRAL_7B, vocab_size=128256)
QWEN25_7B = ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
                        num_kv_heads=4, qkv_bias=True)
SMALL = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 344, "num_layers": 6, "num_heads": 8}
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


def row(rows: list, what: str) -> int:
    return next(n for name, n, _ in rows if name == what)


# ---------------------------------------------------------------- 7B by hand

@pytest.mark.parametrize("config, parameters, adapter, one_base", [
    (LLAMA2_7B, 6.738e9, 40.0e6, 14.84), (MISTRAL_7B, 7.242e9, 41.9e6, 15.9), (QWEN25_7B, 7.615e9, 40.4e6, 16.6),
    (LLAMA3_8B, 8.030e9, 41.9e6, 17.5)])
def test_seven_billion_parameters_as_counted_by_hand(config, parameters, adapter, one_base):
    """bf16 base 2 bytes; policy and value adapters 16 bytes a number; the frozen reward adapter. The hand count has
    that one in bf16, ours stays fp32: 2 bytes a number more."""
    table = memory.estimate(config, "ppo", batch=1, prompt=64, response=64, rollout=1, **BF16)
    assert table.parameters == pytest.approx(parameters, rel=1e-3)
    assert table.trainable == pytest.approx(2 * adapter, rel=2e-3)
    assert (table.static - 2 * adapter) / 1e9 == pytest.approx(one_base, abs=0.05)
    assert [r.name for r in table.roles] == ["base, frozen", "policy adapter", "value adapter", "reward adapter",
                                             "reference = the base itself"]


def test_llama2_7b_in_other_ways():
    table = memory.estimate(LLAMA2_7B, "ppo", batch=1, prompt=64, response=64, rollout=1, **BF16)
    assert (table.static - 2 * 40.0e6) / 1e9 == pytest.approx(14.84, abs=0.01)
    assert [n / 1e9 for _, n in table.compare] == pytest.approx([53.9, 242.6], abs=0.05)
    # our full training keeps its two frozen models in fp32 and freezes the value's lm_head: + 4 * 6.738 - 12 * 0.131
    whole = memory.estimate(LLAMA2_7B, "ppo", batch=1, prompt=64, response=64, rollout=1, lora_r=0, **BF16)
    assert whole.static / 1e9 == pytest.approx(242.6 + 26.95 - 1.57, abs=0.1)
    sft = memory.estimate(LLAMA2_7B, "sft", lora_r=0, **BF16)
    assert sft.static / 1e9 == pytest.approx(16 * 6.738, abs=0.05)


@pytest.mark.parametrize("config, kib", [(LLAMA2_7B, 512), (MISTRAL_7B, 128), (QWEN25_7B, 56), (LLAMA3_8B, 128)])
def test_kv_cache(config, kib):
    table = memory.estimate(config, "ppo", batch=1, prompt=256, response=512, rollout=16, **BF16)
    assert row(table.sampling, "KV cache") == 16 * 768 * kib * 1024


def test_activations_and_logits_of_4096_tokens():
    table = memory.estimate(LLAMA2_7B, "sft", batch=1, length=4096, checkpointing=True, **BF16)
    assert row(table.training, "logits") == 3 * 4096 * 32000 * 4             # 0.52 GB a copy
    inputs, one_layer = 1.07e9, 0.8e9                    # 32 layers x 4096 x 4096 x 2; by hand, roughly
    assert row(table.training, "activations") == pytest.approx(inputs + one_layer, rel=0.1)


def test_the_peak_is_what_stays_plus_the_larger_phase():
    table = memory.estimate(LLAMA2_7B, "ppo", batch=4, prompt=256, response=256, rollout=64, merge=False, **BF16)
    train, sample = (sum(r[1] for r in phase) for phase in (table.training, table.sampling))
    assert table.total == table.static + max(train, sample) and sample > train > 0
    merged = memory.estimate(LLAMA2_7B, "ppo", batch=4, prompt=256, response=256, rollout=64, merge=True, **BF16)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)   # merging keeps the original of every adapted matrix
    assert merged.total - table.total == 2 * linear


@pytest.mark.parametrize("script", [sft, reward_stage, ppo])
def test_scripts_ask_for_the_device_they_run_on(script, monkeypatch):
    """And whether it fits on a card is asked of a card, wherever the question comes from."""
    tables = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(common, "setup", lambda *args, d=device: common.World(torch.device(d), torch.bfloat16))
        monkeypatch.setattr(memory, "free_memory", lambda d, device=device: (d, 1) if d == device else None)
        monkeypatch.setattr(memory, "print_table", lambda table, device=device: tables.update({device: table}))
        assert script.main(script.Config(init="llama-7b", dry_run=True))
    assert tables["cpu"].free[0] == "cpu" and tables["cuda"].free[0] == "cuda"
    assert tables["cpu"].total > tables["cuda"].total == tables["cuda"].on_a_card == tables["cpu"].on_a_card


@pytest.mark.parametrize("merge", [False, True])
def test_packed_matrices_of_a_cpu_are_counted(merge, monkeypatch):
    """Their bytes are those that `sampling.packed` lays out; no copy in fp32, four bits, on a card, of large models."""
    for module in (memory, sampling):                      # arithmetic: also where this machine's CPU cannot
        monkeypatch.setattr(module, "can_pack", lambda: True)
    config = tiny_config(tie_embeddings=True)
    settings, on_cpu = {"batch": 1, "prompt": 4, "response": 4, "rollout": 2, "merge": merge}, {**BF16, "device": "cpu"}
    table = memory.estimate(config, "ppo", **settings, **on_cpu)
    laid_out = []
    monkeypatch.setattr(sampling, "pack", lambda weight, bias: laid_out.append(weight.nbytes))
    with sampling.packed(Transformer(config).bfloat16()):
        pass
    assert row(table.sampling, "packed matrices") == sum(laid_out) > 0
    larger = {**vars(config), "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "head_dim": 1024,
              "num_kv_heads": 4}
    for other, more in ((config, {"dtype": torch.float32}), (config, {"device": "cuda", **BF16}),
                        (config, {"lora_r": 0, "separate_models": True, **on_cpu}), (ModelConfig(**larger), on_cpu),
                        (config, {"quant": "nf4", "merge": False, **on_cpu})):
        names = [name for name, _, _ in memory.estimate(other, "ppo", **{**settings, **more}).sampling]
        assert "KV cache" in names and "packed matrices" not in names, more
    monkeypatch.setattr(memory, "can_pack", lambda: False)
    table = memory.estimate(config, "ppo", **settings, **on_cpu)
    assert "packed matrices" not in [name for name, _, _ in table.sampling]


def test_four_bits_are_offered_where_they_are_possible():
    """A matrix of 36 x 36 is no whole number of groups of 64."""
    flags = {width: [flag for flag, _, _ in memory.estimate(
        ModelConfig(vocab_size=64, hidden_size=width, intermediate_size=8 * width, num_layers=40, num_heads=4),
        "sft", batch=1, length=4, lora_r=1, **BF16).fixes] for width in (36, 64)}
    assert "--quant nf4" in flags[64] and "--quant nf4" not in flags[36]


# ---------------------------------------------------------------- against real tensors

def measured(parameters: list, optimizer) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimiser states that really exist."""
    unique = list({id(p): p for p in parameters}.values())
    states = [t for state in optimizer.state.values() for t in state.values()]
    grads = [p.grad for p in unique if p.grad is not None]
    return tuple(sum(t.numel() * t.element_size() for t in x) for x in (unique, grads, states))


def predicted(table: memory.Table) -> tuple[int, int, int]:
    return tuple(sum(getattr(r, kind) for r in table.roles) for kind in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("r, dtype", [(0, torch.float32), (8, torch.float32), (8, torch.bfloat16)])
def test_static_bytes_are_exact(stage, tied, r, dtype):
    config = ModelConfig(**SMALL, num_kv_heads=2, tie_embeddings=tied, qkv_bias=True)
    model = Transformer(config)
    if r:
        lora.apply(model.to(dtype), r, 16, lora.ALL_LINEAR, stage)
    parameters = list(model.parameters())
    head = nn.Linear(config.hidden_size, 1)                                  # as in reward.RewardModel
    if stage == "reward":
        model.lm_head.requires_grad_(False)
        head.bias.requires_grad_(False)
        parameters += list(head.parameters())
    named = [(f"{i}", p) for i, p in enumerate(parameters) if p.requires_grad]
    optimizer = common.optimizer(named, [{"name": "all", "params": named, "lr": 1.0}], weight_decay=0.1)
    ids = torch.randint(0, 500, (2, 9))
    with lora.use(model, stage if r else None):
        out = model(ids) if stage == "sft" else head(model.hidden(ids).float())
        out.float().square().mean().backward()
    optimizer.step()
    table = memory.estimate(config, stage, batch=2, length=9, lora_r=r, dtype=dtype)
    assert predicted(table) == measured(parameters, optimizer)
    assert table.trainable == sum(p.numel() for _, p in named)


def test_static_bytes_of_four_roles_are_exact():
    config = ModelConfig(**SMALL)
    model = Transformer(config).to(torch.bfloat16)
    for name in ("reward", "policy", "value"):
        lora.apply(model, 4, 8, lora.ALL_LINEAR, name)
    heads = {name: nn.Linear(config.hidden_size, 1) for name in ("reward", "value")}
    trained = [p for name in ("policy", "value") for _, p in lora.parameters(model, name)]
    trained += heads["value"].parameters()
    for p in [*heads["reward"].parameters(), *(p for _, p in lora.parameters(model, "reward"))]:
        p.requires_grad_(False)
    named = [(f"{i}", p) for i, p in enumerate(trained)]
    optimizer = common.optimizer(named, [{"name": "all", "params": named, "lr": 1.0}])
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    table = memory.estimate(config, "ppo", batch=2, prompt=4, response=4, lora_r=4, dtype=torch.bfloat16)
    everything = [*model.parameters(), *heads["reward"].parameters(), *heads["value"].parameters()]
    assert predicted(table) == measured(everything, optimizer)


def saved_bytes(model: Transformer, ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """What autograd keeps for backward, each storage counted once, parameters left out."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t                         # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.hidden(ids, mask)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def peak_bytes(work) -> int:
    """The most that was allocated at once during work(), by the events of torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = top = 0
    for _, n in events:
        now += n
        top = max(top, now)
    return top


def adapted(model: Transformer, r: int, targets: tuple[str, ...], dtype: torch.dtype):
    """(model, the context it trains in): an adapter on a frozen base, or every weight under autocast."""
    if r:
        lora.apply(model.to(dtype), r, 16, targets, "a")
        return model, lambda: lora.use(model, "a")
    return model, lambda: torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def small_model(kv_heads: int, r: int, targets: tuple[str, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    return adapted(Transformer(ModelConfig(**SMALL, num_kv_heads=kv_heads)), r, targets, dtype)


KINDS = [(0, lora.ALL_LINEAR, torch.float32), (0, lora.ALL_LINEAR, torch.bfloat16), (8, lora.ALL_LINEAR, torch.float32),
         (8, lora.ALL_LINEAR, torch.bfloat16), (8, ("q_proj", "v_proj"), torch.bfloat16)]


@pytest.mark.parametrize("kv_heads, batch, length", [(2, 4, 128), (8, 1, 512)])       # attention as on paper, in blocks
@pytest.mark.parametrize("r, targets, dtype", KINDS)
def test_activations_against_saved_tensors_and_the_real_peak(r, targets, dtype, kv_heads, batch, length):
    model, use = small_model(kv_heads, r, targets, dtype)
    ids = torch.randint(0, 500, (batch, length))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0                                     # padded rows: the attention bias is kept too

    def step():
        model.hidden(ids, mask).sum().backward()

    plan = memory.Plan(model.config, "sft", batch, length, lora_r=r, targets=targets, dtype=dtype, device="cpu")
    guess = {on: memory.activations(dataclasses.replace(plan, checkpointing=on)) for on in (False, True)}
    block = memory.block_bytes(plan)                    # in hand for a moment, not kept
    with use():
        assert guess[False] == pytest.approx(saved_bytes(model, ids, mask), rel=0.2)
        step()                                                               # the gradients exist from here on
        assert guess[False] + block == pytest.approx(peak_bytes(step), rel=0.2)
        model.checkpointing = True
        assert guess[True] + block == pytest.approx(peak_bytes(step), rel=0.3)
    assert guess[True] < guess[False] / 2


# Other blocks: no gate, one norm or two beside each other, one key head, windows, soft caps, learned positions, ALiBi.
PLAIN = SMALL | {"intermediate_size": 512, "norm": "layer", "glu": False, "activation": "gelu_tanh", "qkv_bias": True,
                 "out_bias": True, "mlp_bias": True, "num_layers": 4, "max_positions": 1024}
GEMMA = SMALL | {"block": "sandwich", "activation": "gelu_tanh", "embed_scale": 11.3, "num_kv_heads": 4, "head_dim": 32,
                 "num_layers": 4, "window": 64, "tie_embeddings": True}
SHAPES = {
    "gpt2": PLAIN | {"positions": "learned", "tie_embeddings": True},
    "opt": PLAIN | {"positions": "learned", "activation": "relu"},
    "gpt1": PLAIN | {"positions": "learned", "block": "post", "final_norm": False},
    "neox": PLAIN | {"parallel": 2, "rope_dim": 4, "activation": "gelu"},
    "gptj": PLAIN | {"parallel": 1, "rope_dim": 8},
    "falcon": PLAIN | {"parallel": 1, "num_kv_heads": 1, "qkv_bias": False, "activation": "gelu"},
    "bloom": PLAIN | {"positions": "alibi", "embed_norm": True},
    "gemma2": GEMMA | {"attention_softcap": 50.0, "final_softcap": 30.0, "full_layers": (1, 3)},
    "gemma3": GEMMA | {"qk_norm": "head", "full_layers": (3,), "rope_theta_local": 1e4},
    "olmo2": SMALL | {"qk_norm": "full", "block": "inner"},
    "olmo": SMALL | {"norm": "layer", "norm_weight": False, "clip_qkv": 8.0},
    "nanochat": PLAIN | {"norm": "rms", "norm_weight": False, "embed_norm": True, "qk_norm": "head",
                         "activation": "relu_squared", "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    "codegeex": PLAIN | {"positions": "learned", "activation": "quick_gelu", "top_query": "after"}}


@pytest.mark.parametrize("batch, length", [(4, 128), (1, 512)])
@pytest.mark.parametrize("r, dtype", [(0, torch.float32), (0, torch.bfloat16), (8, torch.bfloat16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_of_other_blocks(shape, r, dtype, batch, length):
    """Within an eighth of the tensors that autograd keeps; the mask is counted though nobody keeps it beyond the
    forward, which for ALiBi, one mask for each head, is up to a quarter."""
    torch.manual_seed(0)
    model, use = adapted(Transformer(ModelConfig(**SHAPES[shape])), r, lora.ALL_LINEAR, dtype)
    ids = torch.randint(0, 500, (batch, length))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    plan = memory.Plan(model.config, "sft", batch, length, lora_r=r, dtype=dtype, device="cpu")
    with use():
        guess = memory.activations(plan) + next((n for row, n, _ in memory.training(plan) if row == "bf16 copies"), 0)
        assert guess == pytest.approx(saved_bytes(model, ids, mask), rel=0.25 if shape == "bloom" else 0.125)


@pytest.mark.parametrize("batch, length", [(4, 128), (1, 512)])
@pytest.mark.parametrize("shape", ["gpt2", "neox", "falcon", "gemma2"])
def test_the_real_peak_of_other_blocks(shape, batch, length):
    torch.manual_seed(0)
    model, use = adapted(Transformer(ModelConfig(**SHAPES[shape])), 8, lora.ALL_LINEAR, torch.bfloat16)
    ids = torch.randint(0, 500, (batch, length))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0

    def step():
        model.hidden(ids, mask).sum().backward()

    plan = memory.Plan(model.config, "sft", batch, length, lora_r=8, dtype=torch.bfloat16, device="cpu")
    with use():
        step()
        assert memory.activations(plan) + memory.block_bytes(plan) == pytest.approx(peak_bytes(step), rel=0.2)


def test_static_bytes_of_other_blocks_are_exact():
    """The default targets mean the linears that are there: a block without a gate has six."""
    for shape in ("gpt2", "neox", "falcon", "gemma2"):
        config = ModelConfig(**SHAPES[shape])
        model, _ = adapted(Transformer(config), 8, lora.ALL_LINEAR, torch.bfloat16)
        table = memory.estimate(config, "sft", batch=1, length=8, lora_r=8, dtype=torch.bfloat16)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert table.trainable == trained, shape
        assert sum(r.weights for r in table.roles) == sum(p.numel() * p.element_size() for p in model.parameters())
        merged = memory.estimate(config, "ppo", batch=1, prompt=4, response=4, rollout=1, dtype=torch.bfloat16)
        linears = sum(m.weight.numel() for path, m in model.named_modules() if path.endswith("_proj"))
        assert row(merged.sampling, "unmerged originals") == 2 * linears
        plans = [memory.Plan(config, "sft", lora_r=r, device="cuda") for r in (4, 8)]
        names = {path.split(".")[-1] for path, _ in lora.layers(model)}
        assert memory.layer_bytes(plans[1]) - memory.layer_bytes(plans[0]) == 4 * 4 * len(names)
        without = memory.estimate(config, "sft", batch=1, length=8, lora_r=8, targets=("q_proj", "v_proj"))
        assert without.trainable < table.trainable


# ---------------------------------------------------------------- what it says

def test_nothing_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = ModelConfig(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8)
    table = memory.estimate(config, "ppo", batch=1, prompt=64, response=64, rollout=8, **BF16)
    assert table.parameters == pytest.approx(69e9, rel=0.01)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000             # KiB


def test_advice_leads_down_and_its_figures_are_estimates():
    settings = {"batch": 8, "length": 1024, "lora_r": 0, "dtype": torch.float32, "device": "cuda"}
    table = memory.estimate(LLAMA2_7B, "sft", **settings)
    flags = {flag: (alone, together) for flag, alone, together in table.fixes}
    assert flags["--lora_r 16"][0] == memory.estimate(LLAMA2_7B, "sft", **{**settings, "lora_r": 16}).total
    assert flags["--checkpointing"][0] == memory.estimate(LLAMA2_7B, "sft", **settings, checkpointing=True).total
    assert flags["--dtype bf16"][0] == memory.estimate(LLAMA2_7B, "sft", **{**settings, "dtype": torch.bfloat16}).total
    ladder = [table.total, *(together for _, _, together in table.fixes)]
    assert ladder == sorted(ladder, reverse=True) and len(set(ladder)) == len(ladder)
    assert table.fixes[-1][2] < 15e9 < 100e9 < table.total
    ppo = memory.estimate(LLAMA2_7B, "ppo", batch=4, prompt=256, response=256, rollout=16, **BF16)
    assert ppo.fixes[0][0] == "--no_merge"               # the copy of the weights is what hurts first
    assert "--lora_r 16" not in {f[0] for f in ppo.fixes}


def test_the_table_can_be_read(capsys):
    memory.print_table(memory.estimate(LLAMA2_7B, "ppo", batch=4, prompt=256, response=256, rollout=16, **BF16))
    out = capsys.readouterr().out
    assert "ppo, LoRA r = 16, bf16: 6.7B parameters (6,738,415,616), 80M trained" in out
    for part in ("base, frozen", "policy adapter", "value adapter", "reward adapter", "reference = the base",
                 "13.48 GB",
                 "while training", "while sampling", "16 answers x 512 tokens x 512 KiB", "unmerged originals", "peak",
                 "24 GB no", "40 GB yes", "53.91 GB", "242.58 GB", "--no_merge", "--checkpointing"):
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 140


def test_free_memory_is_that_of_this_machine():
    free = memory.free_memory()
    if free is None:
        pytest.skip("this system has no /proc/meminfo")
    assert 1e8 < free[1] < 1e13


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("kind", ["rwkv", "t5"])
def test_few_layers_and_tokens_tell_what_many_keep(kind, r, checkpointing):
    """The sum over layers (and RWKV's tokens) is, byte for byte, what a pass through all of them keeps."""
    layers = {"num_layers": 5} if kind == "rwkv" else {"num_layers": 5, "num_decoder_layers": 3}
    config = RWKVConfig(97, 48, **layers) if kind == "rwkv" else T5Config(
        97, 48, intermediate_size=80, num_heads=4, head_dim=12, **layers)
    plan = memory.Plan(config, "sft", 2, 50, lora_r=r, checkpointing=checkpointing)
    assert memory.all_layers(plan, checkpointing) == memory.kept_by(plan, layers)
