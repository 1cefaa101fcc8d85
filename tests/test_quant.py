"""QLoRA: a frozen base in four bits, adapters beside it. The reference is the same model with the unpacked weights in
it: what the four bits cost in quality is nf4.py's matter, here nothing may be lost on the way."""
import gc
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, byte_tokenizer, random_ids, randomize, tiny_config, tiny_model
from test_scripts import figure, run, write_rows

import checkpoints
import lora
import memory
import ppo
import sft
from common import UserError, World
from data import tokenizer as tokenizers
from kernels import nf4
from model import ModelConfig, Transformer
from rwkv import RWKV, RWKVConfig

ROOT = Path(__file__).resolve().parents[1]
IDS = random_ids(2, 11)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with biases on q, k and v; 48 x 48 and 24 x 48 are whole numbers of groups."""
    where = tmp_path_factory.mktemp("quant") / "base"
    checkpoints.save(tiny_model(qkv_bias=True), None, where)
    return where


def unpacked(model: Transformer) -> Transformer:
    """The same model with its matrices written out."""
    plain = Transformer(model.config)
    state = {n: p for n, p in model.state_dict().items() if not p.is_meta}
    state |= {f"{path}.weight": nf4.ref_dequantise(m.quantised) for path, m in model.named_modules()
              if getattr(m, "quantised", None) is not None}
    plain.load_state_dict(state, strict=True)
    return plain.eval()


def with_adapter(model, seed: int = 5):
    lora.apply(model, 4, 8.0, name="a")
    generator = torch.Generator().manual_seed(seed)
    for _, p in lora.parameters(model, "a"):
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
    return model


# ---------------------------------------------------------------- loading

def test_only_the_linears_of_the_layers_are_in_four_bits(folder):
    model, _ = checkpoints.load(folder, quant="nf4")
    small = [path for path, m in model.named_modules() if isinstance(m, nf4.QuantisedLinear)]
    assert small == [f"layers.{i}.{part}.{name}" for i in range(2) for part, names in
                     (("self_attn", LINEARS[:4]), ("mlp", LINEARS[4:])) for name in names]
    assert {n for n, p in model.named_parameters() if p.is_meta} == {f"{path}.weight" for path in small}
    original = checkpoints.load(folder)[0]
    for path in small:
        m, w = model.get_submodule(path), original.get_submodule(path).weight
        expected = nf4.quantise(w)
        for a, b in zip(m.quantised[:4], expected):
            assert torch.equal(a, b), path
        assert 0 < float((nf4.dequantise(m.quantised) - w.detach()).norm() / w.detach().norm()) < 0.15
    for name in ("embed_tokens.weight", "lm_head.weight", "norm.weight", "layers.0.self_attn.q_proj.bias"):
        assert torch.equal(model.get_parameter(name), original.get_parameter(name))


def test_never_more_than_one_matrix_is_there_in_full(folder, monkeypatch):
    """Tensors are read and quantised one after the other: before the next is read, the last is gone."""
    real, most = checkpoints.quantise, []

    def full() -> set[int]:
        found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta and t.dim() == 2
                 and t.is_floating_point() and set(t.shape) <= {48, 24, 80}]
        return {t.untyped_storage().data_ptr() for t in found}

    def quantise(w):
        most.append(len(full() - before))
        return real(w)
    monkeypatch.setattr(checkpoints, "quantise", quantise)
    gc.collect()
    before = full()
    model, _ = checkpoints.load(folder, quant="nf4")
    assert len(most) == 14 and max(most) == 1 and not full() - before and model.training is False


def test_from_half_precision_the_groups_are_those_of_the_file(folder):
    model, _ = checkpoints.load(folder, dtype=torch.bfloat16, quant="nf4")
    q = model.layers[1].mlp.up_proj.quantised
    expected = nf4.quantise(checkpoints.load(folder)[0].layers[1].mlp.up_proj.weight)
    assert q.dtype == torch.bfloat16 and torch.equal(q.packed, expected.packed)
    assert model(IDS).dtype == torch.bfloat16


def test_gpt2_s_fused_and_transposed_matrices(tmp_path):
    """Cut and turned first, then quantised: the groups are rows of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = randomize(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=32)))
    theirs.save_pretrained(tmp_path)
    original, model = checkpoints.load(tmp_path)[0], checkpoints.load(tmp_path, quant="nf4")[0]
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        a, b = (m.layers[1].get_submodule(name) for m in (original, model))
        assert torch.equal(nf4.quantise(a.weight).packed, b.quantised.packed) and torch.equal(a.bias, b.bias)
    assert_close(model(IDS), unpacked(model)(IDS))


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="--quant 'int8' is unknown"):
        checkpoints.load(folder, quant="int8")
    with pytest.raises(UserError, match="RWKV: --quant nf4 knows"):
        checkpoints.four_bits(RWKV(RWKVConfig(vocab_size=97, hidden_size=32, num_layers=2)), "nf4", tmp_path)
    checkpoints.save(randomize(Transformer(tiny_config(hidden_size=12, num_heads=2, num_kv_heads=1))), None, tmp_path)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.weight \(12, 12\).*groups of 64"):
        checkpoints.load(tmp_path, quant="nf4")
    for changes in ({"lora_r": 0}, {"merge": True}):
        with pytest.raises(UserError, match="needs adapters"):
            sft.check_quant(ppo.Config(quant="nf4", **changes))


# ---------------------------------------------------------------- arithmetic

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_gradients_are_those_of_the_unpacked_model(folder, dtype):
    """In fp64 nothing hides in rounding: the four bits are exact numbers."""
    small = with_adapter(checkpoints.load(folder, dtype=dtype, quant="nf4")[0])
    plain = with_adapter(unpacked(checkpoints.load(folder, dtype=dtype, quant="nf4")[0]).to(dtype))
    out = {}
    for name, model in (("small", small), ("plain", plain)):
        trained = [p for _, p in lora.parameters(model, "a")]
        for p in trained:
            p.data = p.data.to(dtype)
        x = model.embed_tokens(IDS).detach().requires_grad_()                  # also what flows on to the layer below
        with lora.use(model, "a"):
            h = x
            for i, layer in enumerate(model.layers):
                h = layer(h, None, None, None, i)
            logits = model.lm_head(model.norm(h))
        loss = F.cross_entropy(logits.flatten(0, 1), IDS.flatten())
        out[name] = [logits, *torch.autograd.grad(loss, [x, *trained])]
    for a, b in zip(out["small"], out["plain"], strict=True):
        assert_close(a, b, 2e-6 if dtype == torch.float32 else 1e-13)
        assert float(b.detach().abs().max()) > 1e-6


def test_checkpointing_gives_the_same_gradients(folder):
    model = with_adapter(checkpoints.load(folder, quant="nf4")[0])
    grads = []
    for model.checkpointing in (False, True):
        with lora.use(model, "a"):
            loss = sft.batch_loss(model, IDS, None, torch.ones_like(IDS))
        loss.backward()
        grads.append([p.grad.clone() for _, p in lora.parameters(model, "a")])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_at_first_the_policy_is_the_reference_bit_for_bit(folder):
    model, _ = checkpoints.load(folder, quant="nf4")
    bare = model(IDS)
    lora.apply(model, 4, 8.0, name="policy")
    lora.apply(model, 2, 8.0, ("q_proj", "v_proj"), name="value")
    with lora.use(model, "policy"):
        assert torch.equal(model(IDS), bare)
    with lora.use(model, None):
        assert torch.equal(model(IDS), bare)
    with lora.use(model, "policy", None):                                      # two roles in one pass
        both = model(IDS.repeat(2, 1))
    assert_close(both, bare.repeat(2, 1, 1), 1e-6)
    lora.strip(model)
    assert torch.equal(model(IDS), bare) and isinstance(model.layers[0].mlp.up_proj, nf4.QuantisedLinear)


@pytest.mark.parametrize("graph", [False, True])
def test_generation(folder, graph):
    model = with_adapter(checkpoints.load(folder, quant="nf4")[0])
    plain = with_adapter(unpacked(checkpoints.load(folder, quant="nf4")[0]))
    with lora.use(model, "a"), lora.use(plain, "a"):
        a, b = (m.generate(IDS, 20, generator=torch.Generator().manual_seed(1), graph=graph) for m in (model, plain))
    assert torch.equal(a, b)


# ---------------------------------------------------------------- files and merging

def test_an_adapter_goes_to_disk_and_back_and_into_the_16_bit_base(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = with_adapter(checkpoints.load(folder, quant="nf4")[0])
    lora.save(model, "a", tmp_path / "adapter", base=str(folder))
    with lora.use(model, "a"):
        live = model(IDS)
    again, _ = checkpoints.load(folder, quant="nf4")
    lora.load(again, tmp_path / "adapter", "a")
    with lora.use(again, "a"):
        assert torch.equal(again(IDS), live)
    # The way out that the refusal names.
    original = with_adapter(checkpoints.load(folder)[0])
    with lora.use(original, "a"):
        expected = original(IDS)
    assert_close(checkpoints.load(tmp_path / "adapter")[0](IDS), expected)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert_close(theirs(IDS).logits, expected)
    assert float((live - expected).detach().abs().max()) > 1e-2                         # four bits are not sixteen


def test_merging_and_saving_are_refused_with_a_way_out(folder, tmp_path):
    model = with_adapter(checkpoints.load(folder, quant="nf4")[0])
    with pytest.raises(UserError, match="convert BASE --lora ADAPTER OUT"):
        lora.merge(model, "a")
    with pytest.raises(UserError, match="four bits"), lora.merged(model, "a"):
        pass
    with lora.use(model, "a"):
        assert bool(torch.isfinite(model(IDS)).all())                          # the refusal has changed nothing
    lora.strip(model)
    with pytest.raises(UserError, match="is in four bits, a layout of ours"):
        checkpoints.save(model, None, tmp_path)
    weight = model.layers[0].self_attn.q_proj.weight
    for compute in (lambda: F.linear(torch.ones(1, 48), weight), lambda: weight @ weight, weight.float, weight.any,
                    lambda: model.to(torch.float16)):
        with pytest.raises(RuntimeError, match="is in four bits"):
            compute()


def test_the_fingerprint_sees_the_four_bits(folder):
    model = with_adapter(checkpoints.load(folder, quant="nf4")[0])
    before = ppo.fingerprint(model)
    lora.parameters(model, "a")[0][1].data.add_(1)
    assert ppo.fingerprint(model) == before
    model.layers[1].mlp.down_proj.quantised.packed[7] ^= 1
    assert ppo.fingerprint(model) != before


# ---------------------------------------------------------------- memory

def test_the_estimate_is_the_memory_of_the_loaded_model(folder):
    """Bytes of the base, counted from the tensors that are really there."""
    model, _ = checkpoints.load(folder, quant="nf4")
    real = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    real += sum(m.quantised.nbytes for m in model.modules() if isinstance(m, nf4.QuantisedLinear))
    table = memory.estimate(checkpoints.read_config(folder), "sft", quant="nf4")
    assert table.roles[0].weights == real


def test_7b_trains_below_12_gb():
    """6.5e9 weights of the layers at 4.127 bits are 3.34 GB; embedding and head, 2 x 32,000 x 4,096 in bf16, 0.52; the
    adapters 40.0M x 16 bytes, 0.64. Activations of 4 x 512 tokens and their logits come to 1.8 with checkpointing."""
    config = checkpoints.read_config("llama-7b")
    table = memory.estimate(config, "sft", batch=4, length=512, dtype=torch.bfloat16, checkpointing=True, quant="nf4")
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert table.roles[0].weights == pytest.approx(layers * 4.127 / 8 + 2 * (2 * 32000 * 4096 + 65 * 4096), rel=1e-3)
    assert table.total < 12e9 - memory.RESERVE and table.total == pytest.approx(6.3e9, rel=0.02)
    plain = memory.estimate(config, "sft", batch=4, length=512, dtype=torch.bfloat16, checkpointing=True)
    assert plain.total > 15e9 and "--quant nf4" in [flag for flag, _, _ in plain.fixes]
    assert any(what == "one unpacked matrix" and n == 2 * 4096 * 11008 for what, n, _ in table.training)


# ---------------------------------------------------------------- as a user runs it

TINY = ("--device", "cpu", "--dtype", "fp32", "--quant", "nf4", "--lora_r", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The tiny world of test_scripts.py: one-letter questions, "good" or "evil" as answers."""
    where = tmp_path_factory.mktemp("qlora")
    byte_tokenizer(where / "tokenizer")
    tokenizer = tokenizers.load_tokenizer(where / "tokenizer")
    model = Transformer(ModelConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
                                    num_kv_heads=2, max_positions=256, tie_embeddings=True))
    checkpoints.save(randomize(model, std=0.05), tokenizer, where / "base")
    dice, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    write_rows(where / "sft.jsonl", [{"messages": [
        {"role": "user", "content": dice.choice(letters)},
        {"role": "assistant", "content": dice.choice(("good", "evil"))}]} for _ in range(160)])
    write_rows(where / "pairs.jsonl", [{"prompt": dice.choice(letters), "chosen": "good", "rejected": "evil"}
                                       for _ in range(64)])
    write_rows(where / "prompts.jsonl", [{"prompt": dice.choice(letters)} for _ in range(64)])
    return where


def gated(script: str, *args) -> str:
    """Runs to its gate. A few steps need not pass it (exit code 1): what they must reach is asserted by the tests."""
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=300)
    assert "GATE" in done.stdout, done.stdout + done.stderr
    return done.stdout


def fine_tune(place: Path, out: str, *more) -> str:
    return gated("sft.py", "--init", place / "base", "--data", place / "sft.jsonl", "--out_dir", place / out, "--lr",
               "1e-2", "--batch_size", "16", "--micro_batch", "8", "--max_len", "64", "--answer_len", "8",
               "--eval_answers", "4", "--save_every", "5", "--steps", "10", "--schedule", "constant", *TINY, *more)


def test_the_recipe_over_a_base_in_four_bits(place):
    """SFT lowers its loss and keeps only the adapter; reward model and PPO share one base in four bits; chat.py talks
    to the run folder."""
    output = fine_tune(place, "sft")
    assert "convert" in output and figure(place / "sft", "eval/loss", -1) < figure(place / "sft", "eval/loss", 0) - 1
    assert not (place / "sft/model").exists() and (place / "sft/adapter/tokenizer.json").exists()
    start = place / "sft/adapter"
    gated("reward.py", "--init", start, "--data", place / "pairs.jsonl", "--out_dir", place / "reward", "--lr", "2e-3",
          "--batch_size", "8", "--valid_share", "0.25", *TINY)
    assert figure(place / "reward", "eval/accuracy", -1) == 1
    gated("ppo.py", "--init", start, "--reward", place / "reward/model", "--data", place / "prompts.jsonl",
          "--out_dir", place / "ppo", "--steps", "2", "--batch_size", "16", "--micro_batch", "16", "--response_len",
          "8", "--ppo_epochs", "1", "--eval_prompts", "16", *TINY)
    assert figure(place / "ppo", "val/first_ratio_gap", 0) == 0 and figure(place / "ppo", "eval/kl", 0) == 0
    assert not (place / "ppo/model").exists()
    config = json.loads((place / "ppo/policy/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(start)                     # an adapter on an adapter
    for folder in ("sft", "ppo"):
        assert run("chat.py", place / folder, "--prompt", "a", "--device", "cpu", "--max_new_tokens", "8").strip()
    done = subprocess.run([sys.executable, "-m", "checkpoints", "convert", str(place / "base"), "--lora", str(start),
                           str(place / "merged")], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    a, b = (checkpoints.load(p)[0](IDS) for p in (place / "merged", start))
    assert_close(a, b)
    # The next stage reads four bits of W + BA, where SFT had BA beside four bits of W.
    cfg = sft.Config(data=str(place / "sft.jsonl"), max_len=64, quant="nf4")
    model, tokenizer = checkpoints.load(place / "merged", quant="nf4")
    world = World(torch.device("cpu"), torch.float32)
    there = sft.evaluate(model, sft.prepare(cfg, tokenizer)[1], tokenizer, cfg, world)
    assert figure(place / "sft", "eval/saved_loss", 0) == pytest.approx(there["eval/loss"], rel=1e-5)
    assert there["eval/loss"] != pytest.approx(figure(place / "sft", "eval/loss", -1), rel=2e-4)
    gate = json.loads((place / "sft/gate.json").read_text(encoding="utf-8"))["checks"]
    assert {"name": "and as saved, in four bits anew", "ok": True, "figure": f"{there['eval/loss']:.3f}"} in gate
    said = {quant: run("chat.py", start, "--prompt", "a", "--device", "cpu", "--temperature", "0", "--max_new_tokens",
                       "40", "--quant", quant, "--dtype", "fp32") for quant in ("", "nf4")}
    for quant, text in said.items():
        model, tokenizer = checkpoints.load(start, quant=quant)
        ids = tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=True)[0]
        new = model.generate(torch.tensor([ids]), 40, temperature=0.0, eos_ids=tokenizer.eos_ids)[0].tolist()
        stop = new[-1] in tokenizer.eos_ids
        assert text.splitlines()[0] == tokenizer.decode(new[:-1] if stop else new).strip(), quant


def test_resume_gives_the_same_bits(place):
    fine_tune(place, "straight")
    fine_tune(place, "half", "--steps", "5")
    half = (place / "half/adapter/adapter_model.safetensors").read_bytes()
    fine_tune(place, "half", "--resume")
    a, b = ((place / f"{x}/adapter/adapter_model.safetensors").read_bytes() for x in ("straight", "half"))
    assert a == b != half
