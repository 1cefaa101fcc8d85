"""lora.py against hand-worked numbers, against merged weights, and against PEFT's own files in both directions."""
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
import sampling
from common import UserError
from model import Transformer

REPO = Path(__file__).resolve().parents[1]


def train(model: nn.Module, name: str, seed: int = 7, std: float = 0.1) -> nn.Module:
    """Stands for training: B, zero at the start, gets values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in lora.parameters(model, name):
            if ".lora_B." in path:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def adapted(r: int = 4, alpha: float = 8.0, targets=lora.ALL_LINEAR, name: str = "default", **changes) -> Transformer:
    """A tiny model with one trained adapter, the same at every call."""
    model = tiny_model(**changes)
    torch.manual_seed(0)
    lora.apply(model, r, alpha, targets, name)
    return train(model, name)


@torch.no_grad()
def logits_with(model: nn.Module, name: str | None, ids: Tensor) -> Tensor:
    with lora.use(model, name):
        return model(ids)


IDS = random_ids(2, 10)


# ---------------------------------------------------------------- the start, and the formula

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_step_equals_the_base_bit_for_bit(dtype):
    model = tiny_model(qkv_bias=True, mlp_bias=True).to(dtype)
    base = model(IDS)
    lora.apply(model, r=4, alpha=8, targets=(*lora.ALL_LINEAR, "lm_head"), name="policy")
    with lora.use(model, "policy"):
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), base)
    assert all(p.dtype == torch.float32 for _, p in lora.parameters(model, "policy"))
    assert model(IDS).dtype == dtype


def test_the_delta_by_hand():
    """r = 1, alpha = 3, A = [1, 2], B = [1, -1]^T: delta = 3 [[1, 2], [-1, -2]]; x = [1, 1] adds 3 * 3 * [1, -1]."""
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})
    model["q_proj"].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    lora.apply(model, r=1, alpha=3, targets=("q_proj",), name="a")
    layer = model["q_proj"]
    layer.lora_A["a"].data = torch.tensor([[1.0, 2.0]])
    layer.lora_B["a"].data = torch.tensor([[1.0], [-1.0]])
    assert layer.delta("a").tolist() == [[3.0, 6.0], [-3.0, -6.0]]
    x = torch.tensor([[[1.0, 1.0]]])
    assert layer(x).tolist() == [[[1.0, 1.0]]]
    with lora.use(model, "a"):
        assert layer(x).tolist() == [[[10.0, -8.0]]]
        assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[10.0, -8.0]]
    lora.merge(model, "a")
    assert layer.weight.tolist() == [[4.0, 6.0], [-3.0, -5.0]]


def test_the_scale_is_alpha_over_r():
    for r, alpha in ((2, 8.0), (8, 8.0), (4, 6.0)):
        model = adapted(r=r, alpha=alpha)
        layer = model.layers[0].self_attn.k_proj
        expected = alpha / r * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
        x = torch.randn(3, 48)
        with lora.use(model, "default"):
            assert_close(layer(x) - F.linear(x, layer.weight), x.double() @ expected.T, 1e-5)


def test_a_starts_uniform_and_b_zero():
    """kaiming_uniform with a = sqrt(5): uniform in +-1/sqrt(in); its std is 1 / sqrt(3 in)."""
    model = tiny_model()
    lora.apply(model, r=16, targets=("down_proj",))
    layer = model.layers[0].mlp.down_proj
    A = layer.lora_A["default"].detach()
    assert A.shape == (16, 80) and layer.lora_B["default"].shape == (48, 16)
    assert float(A.abs().max()) <= 1 / math.sqrt(80)
    assert float(A.std()) == pytest.approx(1 / math.sqrt(3 * 80), rel=0.05)
    assert not bool(layer.lora_B["default"].any())


def test_state_dict_keys_of_the_base_stay():
    model = tiny_model(qkv_bias=True)
    before = {name: tensor for name, tensor in model.state_dict().items()}
    lora.apply(model, r=2)
    after = model.state_dict()
    assert {name for name in after if "lora_" not in name} == set(before)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())    # nothing was copied


# ---------------------------------------------------------------- what is trained

def test_only_the_adapter_is_trained():
    model = tiny_model()
    lora.apply(model, r=2, targets=("q_proj", "v_proj"), name="policy")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in lora.parameters(model, "policy")}
    assert len(trainable) == 2 * 2 * 2                                         # layers x linears x halves
    assert sum(p.numel() for _, p in lora.parameters(model, "policy")) == 2 * (2 * (48 + 48) + 2 * (48 + 24))


def test_only_the_active_adapter_gets_a_gradient():
    model = adapted(name="policy")
    lora.apply(model, 2, 4.0, lora.ALL_LINEAR, "value")
    train(model, "value", seed=8)
    with lora.use(model, "value"):
        model(IDS).square().mean().backward()
    for name, p in model.named_parameters():
        if name.endswith(".value"):
            assert p.grad is not None and bool(p.grad.any()), name
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_weights_themselves(checkpointing):
    """dL/dB = scale dL/dW A^T and dL/dA = scale B^T dL/dW, with dL/dW from the merged model."""
    model = adapted(r=4, alpha=8.0)
    model.checkpointing = checkpointing
    with lora.use(model, "default"):
        loss = model(IDS).square().mean()
    loss.backward()                                    # outside `use`: recomputing must still see the adapter
    plain = tiny_model()
    with torch.no_grad():
        for path, layer in lora.layers(model):
            plain.get_submodule(path).weight += layer.delta("default")
    plain(IDS).square().mean().backward()
    for path, layer in lora.layers(model):
        dW = plain.get_submodule(path).weight.grad
        assert_close(layer.lora_B["default"].grad, 2.0 * dW @ layer.lora_A["default"].T, 1e-4, path)
        assert_close(layer.lora_A["default"].grad, 2.0 * layer.lora_B["default"].T @ dW, 1e-4, path)


def test_checkpointing_sees_the_adapter_of_its_forward():
    """Three roles go forward one after the other, then one backward goes through all of them, with one switched on."""
    grads = []
    for checkpointing in (False, True):
        model = adapted(name="policy")
        lora.apply(model, 3, 6.0, ("q_proj", "down_proj"), "value")
        train(model, "value", seed=8)
        model.checkpointing = checkpointing
        total = 0.0
        for role in ("policy", "value", None):
            with lora.use(model, role):
                total = total + model(IDS).square().mean() * (2 if role == "value" else 1)
        with lora.use(model, "policy"):
            total.backward()
        grads.append({name: p.grad.clone() for role in ("policy", "value") for name, p in lora.parameters(model, role)})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-5, name)


# ---------------------------------------------------------------- roles

def test_switching_roles_and_back_changes_no_bit():
    model = adapted(name="policy")
    base_model = tiny_model()
    lora.apply(model, 2, 8.0, ("q_proj", "o_proj"), "value")
    train(model, "value", seed=8)
    first = {role: logits_with(model, role, IDS) for role in ("policy", "value", None)}
    again = {role: logits_with(model, role, IDS) for role in (None, "value", "policy", "value", None, "policy")}
    for role, logits in first.items():
        assert torch.equal(again[role], logits)
    assert torch.equal(first[None], base_model(IDS))                           # None: the weights that were loaded
    assert torch.equal(model(IDS), first[None])                                # and so without any `use`
    assert error(first["policy"], first[None]) > 0.01 < error(first["value"], first["policy"])


def test_use_ends_also_with_an_error_and_nests():
    model = adapted(name="policy")
    lora.copy(model, "policy", "value")
    train(model, "value", seed=9)
    base, policy, value = (logits_with(model, role, IDS) for role in (None, "policy", "value"))
    with pytest.raises(ZeroDivisionError):
        with lora.use(model, "policy"):
            raise ZeroDivisionError
    assert torch.equal(model(IDS), base)
    with lora.use(model, "policy") as given:
        assert given is model
        with lora.use(model, "value"):
            assert torch.equal(model(IDS), value)
            with lora.use(model, None):
                assert torch.equal(model(IDS), base)
            assert torch.equal(model(IDS), value)
        assert torch.equal(model(IDS), policy)
    with lora.use(tiny_model(), None) as plain:                        # without adapters a model is its own base
        assert torch.equal(plain(IDS), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_the_rows_must_be_equal_and_sampling_has_one_adapter(dtype):
    """Rows that have ended leave the batch: from then on the others would wear each other's adapters."""
    model = adapted(name="policy").to(dtype)
    with pytest.raises(UserError, match="needs a name"):
        with lora.use(model):
            pass
    with lora.use(model, "policy", None), pytest.raises(UserError, match="3 rows are no equal shares for 2 adapters"):
        model(random_ids(3, 5))
    for tokens in (4, 20):                                             # below and above what is worth packing
        with lora.use(model, "policy", None), pytest.raises(UserError, match="one adapter for all rows"):
            model.generate(random_ids(4, 5), tokens)
        with lora.use(model, "policy"):
            assert model.generate(random_ids(4, 5), tokens).shape == (4, tokens)


def test_names_that_do_not_exist_are_errors():
    model = tiny_model()
    with pytest.raises(UserError, match="'q_prj' is no linear layer.*down_proj.*q_proj"):
        lora.apply(model, targets=("q_proj", "q_prj"))
    assert not list(lora.layers(model)) and all(p.requires_grad for p in model.parameters())     # nothing has happened
    with pytest.raises(KeyError, match="policy"):
        with lora.use(model, "policy"):
            pass
    lora.apply(model, name="policy")
    with pytest.raises(UserError, match="already has an adapter named 'policy'"):
        lora.apply(model, name="policy")
    for call in (lambda: lora.merge(model, "value"), lambda: lora.copy(model, "value", "new"),
                 lambda: lora.use(model, "value").__enter__()):
        with pytest.raises(KeyError, match="value"):                           # doing nothing would look like success
            call()


def test_the_default_is_every_linear_there_is_and_a_named_one_must_exist():
    model = tiny_model(glu=False, activation="gelu")
    lora.apply(model, 2, 4.0)
    assert {path.split(".")[-1] for path, _ in lora.layers(model)} == set(lora.ALL_LINEAR) - {"gate_proj"}
    with pytest.raises(UserError, match="'gate_proj' is no linear layer"):
        lora.apply(tiny_model(glu=False), 2, 4.0, ("q_proj", "gate_proj"))


def test_copy_starts_equal_and_goes_its_own_way():
    model = adapted(r=3, alpha=5.0, targets=("q_proj", "up_proj"), name="reward")
    lora.copy(model, "reward", "value")
    reward = logits_with(model, "reward", IDS)
    assert torch.equal(logits_with(model, "value", IDS), reward)
    train(model, "value", seed=9)
    assert torch.equal(logits_with(model, "reward", IDS), reward)
    assert error(logits_with(model, "value", IDS), reward) > 0.01


def test_generate_speaks_as_the_active_adapter():
    model = adapted(name="policy")
    merged = adapted(name="policy")
    lora.merge(merged, "policy")
    lora.strip(merged)
    with lora.use(model, "policy"):
        policy = model.generate(IDS, 8, temperature=0.0)
    assert torch.equal(policy, merged.generate(IDS, 8, temperature=0.0))
    assert not torch.equal(policy, model.generate(IDS, 8, temperature=0.0))


# ---------------------------------------------------------------- merge

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_equals_live_and_unmerge_restores_every_bit(dtype):
    model = adapted(name="policy", targets=(*lora.ALL_LINEAR, "lm_head")).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live, base = logits_with(model, "policy", IDS), logits_with(model, None, IDS)
    lora.merge(model, "policy")
    assert_close(logits_with(model, "policy", IDS), live, 1e-5 if dtype == torch.float32 else 0.1)
    assert model.state_dict().keys() == before.keys()                  # the kept original is no weight of the model
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert len(changed) == 2 * 7 + 1                                   # the weights of the targets, nothing else
    lora.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits_with(model, None, IDS), base)
    assert torch.equal(logits_with(model, "policy", IDS), live)


def test_merge_rounds_once():
    """bf16: the sum is taken in fp32 and rounded at the end, within half a unit in the last place of the exact one."""
    model = adapted().to(torch.bfloat16)
    layer = model.layers[0].mlp.up_proj
    exact = layer.weight.double() + 2.0 * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    lora.merge(model, "default")
    assert bool(((layer.weight.double() - exact).abs() <= exact.abs() * 2 ** -8).all())


def test_a_merged_model_refuses_another_adapter():
    model = adapted(name="policy")
    lora.copy(model, "policy", "value")
    lora.merge(model, "policy")
    for other in ("value", None):                                              # the base is not there just now, either
        with pytest.raises(RuntimeError, match="'policy' is merged"):
            logits_with(model, other, IDS)
    with pytest.raises(RuntimeError, match="already contains adapter 'policy'"):
        lora.merge(model, "value")
    lora.unmerge(model)
    lora.unmerge(model)                                                        # a second time: nothing to do
    logits_with(model, "value", IDS)


def test_merged_context_restores_also_after_an_error():
    model = adapted(name="policy")
    live, base = logits_with(model, "policy", IDS), logits_with(model, None, IDS)
    with lora.merged(model, "policy"):
        assert_close(model(IDS), live, 1e-5)                                   # it switches the adapter on as well
    with pytest.raises(ZeroDivisionError):
        with lora.merged(model, "policy"):
            raise ZeroDivisionError
    assert torch.equal(model(IDS), base)
    assert torch.equal(logits_with(model, "policy", IDS), live)


def test_merge_without_the_original_cannot_be_undone():
    model = adapted()
    lora.merge(model, "default", keep_original=False)
    assert all(layer.original is None for _, layer in lora.layers(model))
    with pytest.raises(RuntimeError, match="keep_original=False"):
        lora.unmerge(model)


def test_strip_leaves_plain_linears():
    model = adapted(name="policy", qkv_bias=True)
    live, base = logits_with(model, "policy", IDS), logits_with(model, None, IDS)
    lora.merge(model, "policy", keep_original=False)
    lora.strip(model)
    assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == tiny_model(qkv_bias=True).state_dict().keys()
    assert_close(model(IDS), live, 1e-5)
    model.checkpointing = True
    model.requires_grad_(True)
    model(IDS).mean().backward()                                               # no adapter is asked for any more
    unmerged = adapted(name="policy", qkv_bias=True)
    lora.strip(unmerged)
    assert torch.equal(unmerged(IDS), base)


def test_a_tied_head_does_not_take_the_embedding_along():
    """Head and embedding are one tensor: an adapter on the head must not change what the embedding looks up."""
    model = tiny_model(tie_embeddings=True)
    embedding = model.embed_tokens.weight.clone()
    lora.apply(model, 4, 8.0, ("lm_head", "q_proj"))
    train(model, "default")
    live = logits_with(model, "default", IDS)
    with lora.merged(model, "default"):
        assert torch.equal(model.embed_tokens.weight, embedding)
        assert_close(model(IDS), live, 1e-5)
    assert model.lm_head.weight is model.embed_tokens.weight                   # and afterwards they are one again


# ---------------------------------------------------------------- save and load

def test_saved_and_loaded_in_a_new_process_gives_the_same_bits(tmp_path):
    model = adapted(name="policy", qkv_bias=True)
    torch.save({k: v for k, v in model.state_dict().items() if "lora_" not in k}, tmp_path / "base.pt")
    (tmp_path / "config.json").write_text(json.dumps(asdict(model.config)), encoding="utf-8")
    lora.save(model, "policy", tmp_path / "adapter")
    script = """if True:
        import json, sys, torch, lora
        from model import ModelConfig, Transformer
        torch.set_num_threads(int(sys.argv[2]))
        model = Transformer(ModelConfig(**json.load(open(sys.argv[1] + '/config.json', encoding='utf-8'))))
        model.load_state_dict(torch.load(sys.argv[1] + '/base.pt', weights_only=True))
        lora.load(model, sys.argv[1] + '/adapter', 'other_name')
        ids = torch.load(sys.argv[1] + '/ids.pt', weights_only=True)
        with torch.no_grad(), lora.use(model, 'other_name'):
            torch.save(model(ids), sys.argv[1] + '/logits.pt')
    """
    torch.save(IDS, tmp_path / "ids.pt")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())], cwd=REPO,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits_with(model, "policy", IDS))


def test_keys_are_peft_s_and_carry_no_adapter_name(tmp_path):
    model = adapted(name="policy", targets=("q_proj", "lm_head"))
    lora.save(model, "policy", tmp_path, base="some/base")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{path}.{half}.weight" for half in ("lora_A", "lora_B")
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head")}
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "some/base")
    assert config["target_modules"] == ["lm_head", "q_proj"]


def test_nothing_worth_saving_is_not_saved(tmp_path):
    model = tiny_model()
    with pytest.raises(UserError, match="no tensors"):
        lora.save(model, "policy", tmp_path / "none")
    lora.apply(model, 4, 8.0, name="policy")
    with pytest.raises(UserError, match="all zero in B"):
        lora.save(model, "policy", tmp_path / "zero")
    train(model, "policy")
    model.layers[1].mlp.gate_proj.lora_A["policy"].data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"not finite in .*layers\.1\.mlp\.gate_proj\.lora_A"):
        lora.save(model, "policy", tmp_path / "nan")
    assert not list(tmp_path.rglob("*.safetensors"))


def broken_adapter(tmp_path: Path, change) -> Path:
    """A saved adapter whose tensors went through `change`."""
    lora.save(adapted(), "default", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


BASE = "base_model.model.model."
KEY = BASE + "layers.1.self_attn.k_proj"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(f"{KEY}.lora_A.weight"), r"layers\.1\.self_attn\.k_proj has only lora_B"),
    (lambda t: t.pop(f"{KEY}.lora_B.weight"), r"layers\.1\.self_attn\.k_proj has only lora_A"),
    (lambda t: t.update({f"{KEY}.lora_magnitude_vector.weight": torch.ones(3)}), "magnitude_vector.* has no place"),
    (lambda t: t.update({BASE + "layers.7.self_attn.k_proj.lora_A.weight": torch.ones(4, 48)}), "s.7.* has no place"),
    (lambda t: t.update({BASE + "embed_tokens.weight": torch.ones(97, 48)}), "embed_tokens.* has no place"),
    (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 47)}), r"lora_A of .*k_proj is \(4, 47\).* \(4, 48\)"),
    (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(24, 5)}), r"lora_B of .*k_proj is \(24, 5\).* \(24, 4\)"),
], ids=["no A", "no B", "dora", "layer 7", "embedding", "shape of A", "shape of B"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    directory = broken_adapter(tmp_path, change)
    model = tiny_model()
    with pytest.raises(UserError, match=message):
        lora.load(model, directory)
    assert not list(lora.layers(model, "default"))                             # no half of an adapter stays behind


def test_a_directory_without_an_adapter_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        lora.load(tiny_model(), tmp_path)


def test_an_adapter_is_loaded_beside_others(tmp_path):
    source = adapted(name="policy")
    lora.save(source, "policy", tmp_path)
    model = adapted(name="first", targets=("q_proj",))
    first = logits_with(model, "first", IDS)
    assert lora.load(model, tmp_path, "second") is None                        # no reward head in it
    assert torch.equal(logits_with(model, "second", IDS), logits_with(source, "policy", IDS))
    assert torch.equal(logits_with(model, "first", IDS), first)


def test_different_ranks_and_scales_survive(tmp_path):
    theirs, model = twins(tiny_config())
    torch.manual_seed(0)
    lora.attach(model, "a", {"layers.0.self_attn.q_proj": (2, 4.0), "layers.1.self_attn.q_proj": (8, 0.5),
                             "layers.1.mlp.up_proj": (8, 4.0), "lm_head": (3, 1.5)})
    train(model, "a")
    lora.save(model, "a", tmp_path)
    _, again = twins(tiny_config())
    lora.load(again, tmp_path, "b")
    assert torch.equal(logits_with(again, "b", IDS), logits_with(model, "a", IDS))
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert_close(loaded(input_ids=IDS).logits, logits_with(model, "a", IDS))


# ---------------------------------------------------------------- PEFT, both ways

def peft_adapter(**changes):
    """transformers' tiny LLaMA with a PEFT adapter whose B is random."""
    peft = pytest.importorskip("peft")
    theirs, ours = twins(tiny_config())
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(lora.ALL_LINEAR), "lora_dropout": 0.0,
                                "task_type": "CAUSAL_LM", **changes})
    model = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval(), ours


@pytest.mark.parametrize("changes", [
    {},
    {"use_rslora": True},
    {"target_modules": ["q_proj", "lm_head"]},
    {"rank_pattern": {"k_proj": 2}},
    {"alpha_pattern": {"k_proj": 32}},
    {"alpha_pattern": {"layers.0.self_attn.q_proj": 32, "down_proj": 1}, "rank_pattern": {"down_proj": 6}},
    {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 32}},                # full names, as PEFT counts them
    {"alpha_pattern": {r"layers\.\d+\.mlp\.(up|gate)_proj": 32}},              # expressions
    {"alpha_pattern": {"^model.layers.1.mlp.up_proj": 32}},
    {"alpha_pattern": {"roj": 32, "lf_attn.q_proj": 32}},              # no whole name: PEFT does not match these
    {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"q_proj": 3, "o_proj": 5}},
    {"layers_to_transform": [1]},
], ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:70] or "plain")
@torch.no_grad()
def test_an_adapter_of_peft_gives_peft_s_logits(tmp_path, changes):
    theirs, ours = peft_adapter(**changes)
    theirs.save_pretrained(tmp_path)
    assert lora.load(ours, tmp_path, "theirs") is None
    expected = theirs(input_ids=IDS).logits
    assert_close(logits_with(ours, "theirs", IDS), expected)
    assert error(ours(IDS), expected) > 0.01
    lora.merge(ours, "theirs")
    assert_close(logits_with(ours, "theirs", IDS), expected)


@torch.no_grad()
def test_our_adapter_gives_our_logits_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = twins(tiny_config())
    lora.apply(ours, 4, 6.0, ("q_proj", "k_proj", "down_proj", "lm_head"), "policy")
    train(ours, "policy")
    lora.save(ours, "policy", tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    expected = logits_with(ours, "policy", IDS)
    assert_close(loaded(input_ids=IDS).logits, expected)
    assert error(logits_with(ours, None, IDS), expected) > 0.01
    assert_close(loaded.merge_and_unload()(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_an_rslora_adapter_keeps_its_scale_when_saved_again(tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = peft_adapter(use_rslora=True, r=8)
    theirs.save_pretrained(tmp_path / "first")
    lora.load(ours, tmp_path / "first", "a")
    lora.save(ours, "a", tmp_path / "second")
    plain, _ = twins(tiny_config())
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "second")
    assert_close(again(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@torch.no_grad()
def test_a_reward_head_travels_both_ways(tmp_path):
    """Our adapter with its head is a classifier of one class for PEFT, and PEFT's classifier gives us its head."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForSequenceClassification
    config = tiny_config()
    theirs = randomize(LlamaForSequenceClassification(hf_config(config, num_labels=1))).eval()
    ours = Transformer(config).eval()
    ours.load_state_dict({k: v for k, v in hf_state(theirs).items() if k != "score.weight"}, strict=False)
    lora.apply(ours, 4, 8.0, name="reward")
    train(ours, "reward")
    head = torch.randn(1, 48)
    lora.save(ours, "reward", tmp_path / "ours", head=head)
    with lora.use(ours, "reward"):
        expected = F.linear(ours.hidden(IDS)[:, -1], head)             # no pads: the last token is the last real one
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    assert_close(loaded(input_ids=IDS).logits, expected)
    loaded.save_pretrained(tmp_path / "theirs")
    back = Transformer(config).eval()
    back.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" not in k})
    assert torch.equal(lora.load(back, tmp_path / "theirs", "value"), head)
    with lora.use(back, "value"):
        assert_close(F.linear(back.hidden(IDS)[:, -1], head), expected)


# ---------------------------------------------------------------- packed for sampling

def is_packed(module: torch.nn.Module) -> bool:
    return "forward" in vars(module)


@needs_packing
@pytest.mark.parametrize("shape", [(3, 1), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_gives_the_bits_of_use(shape, bias):
    """W and A as one product, for one token and for several, with and without biases."""
    model = tiny_model(qkv_bias=bias, out_bias=bias, mlp_bias=bias).bfloat16()
    lora.apply(model, 4, 8.0, name="a")
    for i, (_, p) in enumerate(lora.parameters(model, "a")):
        torch.nn.init.normal_(p.data, std=0.2, generator=torch.Generator().manual_seed(i))
    ids = random_ids(*shape)
    with torch.no_grad(), lora.use(model, "a"):
        expected = model(ids)
        text = model.generate(ids, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), lora.packed(model, "a"):
        assert all(is_packed(m) for _, m in lora.layers(model)) and is_packed(model.lm_head), "is there no mkldnn?"
        assert torch.equal(model(ids), expected)
        assert torch.equal(model.generate(ids, 6, generator=torch.Generator().manual_seed(1)), text)
    assert not any(map(is_packed, model.modules()))
    with torch.no_grad(), lora.use(model, "a"):
        assert torch.equal(model(ids), expected)


@needs_packing
def test_packed_falls_back_to_use_where_it_cannot_pack(monkeypatch):
    model = tiny_model()
    lora.apply(model, 4, 8.0, name="a")
    for how in ("fp32", "too big", "a CPU without bf16"):
        if how == "too big":
            model.bfloat16()
            monkeypatch.setattr(sampling, "LARGEST", 10)
        if how == "a CPU without bf16":                    # there the library's packing fails
            monkeypatch.undo()
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
            monkeypatch.setattr(sampling, "pack", None)
        with lora.packed(model, "a"):
            assert not any(map(is_packed, model.modules()))
            assert model.generate(IDS, 20).shape == (len(IDS), 20), how
    monkeypatch.undo()
    assert sampling.can_pack(), "was anything tested?"


@needs_packing
def test_packing_a_merged_model_refuses_another_adapter():
    model = tiny_model().bfloat16()
    for name in ("a", "b"):
        lora.apply(model, 4, 8.0, name=name)
    with lora.merged(model, "a"):
        with pytest.raises(RuntimeError, match="'a' is merged.*'b'"), lora.packed(model, "b"):
            pass
        with lora.packed(model, "a"):
            assert all(is_packed(m) for _, m in lora.layers(model))
    assert not any(map(is_packed, model.modules()))


def test_packed_is_undone_after_an_error():
    model = tiny_model().bfloat16()
    lora.apply(model, 4, 8.0, name="a")
    with pytest.raises(KeyError), lora.packed(model, "a"):
        raise KeyError
    assert not any(map(is_packed, model.modules()))
