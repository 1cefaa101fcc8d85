"""Adapters and deltas on every kind of base: peft trains (random weights in every A, B, bias, copy and magnitude), peft
merges, and what we load or convert from base file + adapter file must be that.
"""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_close, randomize, tiny_config, twins
from safetensors.torch import load_file, save_file
from test_convert import edit, reload
from test_families import IDS, MODELS, theirs_of, theirs_on

import checkpoints
from checkpoints import formats
from checkpoints.convert import convert
from common import UserError

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"


def adapted(theirs, seed: int = 5, **settings):
    """A peft model whose every trained number is random."""
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(theirs, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator) * 0.3
                p.copy_(noise.abs() + 0.5 if "magnitude" in name else noise)
    return model


def write(theirs, folder: Path, **settings):
    """Base and adapter as files. -> peft's model, and its logits before merging."""
    theirs.save_pretrained(folder / "base")
    model = adapted(theirs, **settings)
    model.save_pretrained(folder / "adapter")
    return model, theirs_on(model, IDS)


def check(folder: Path, expected: torch.Tensor, attention: str = "sdpa", adapters=("adapter",), base="base",
          tolerance: float = 2e-5, **how):
    """Through load and through convert."""
    lora = [folder / name for name in adapters]
    model, _ = checkpoints.load(folder / base, lora=lora, **how)
    with torch.no_grad():
        assert_close(model(IDS), expected, tolerance, "load")
    convert(folder / base, folder / "out", lora, **how)
    assert_close(theirs_on(reload(folder / "out", attention), IDS), expected, tolerance, "convert")
    return model


# ---------------------------------------------------------------- every kind of layer

FAMILIES = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],                          # Conv1D, fused, and c_proj of attention is square
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"], "bloom": ["query_key_value", "dense_4h_to_h"],
    "falcon 40b": ["query_key_value", "dense"], "mpt": ["Wqkv", "down_proj"], "opt": ["q_proj", "v_proj", "fc1"],
    "gptj": ["q_proj", "v_proj", "fc_in"], "codegen": ["qkv_proj", "out_proj"], "gpt_neo": ["q_proj", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj"], "gemma": "all-linear", "qwen3": "all-linear", "starcoder": ["c_attn", "c_fc"],
    "glm4 9b": ["q_proj", "gate_up_proj"], "openai-gpt": ["c_attn", "c_proj"], "llama 3.1": "all-linear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family(family, tmp_path):
    theirs = theirs_of(family)
    plain = theirs_on(theirs, IDS)
    model, expected = write(theirs, tmp_path, target_modules=FAMILIES[family])
    attention = theirs.config._attn_implementation
    assert (expected - plain).abs().max() > 0.1
    check(tmp_path, expected, attention)
    merged = model.merge_and_unload()
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        if name in state:                                    # not the tied head
            assert_close(state[name], tensor, 2e-6, name)


ODD = {
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
                 "rank_pattern": {"layers.1.self_attn.q_proj": 8, "up_proj": 2},
                 "alpha_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 3, "layers.0.self_attn.v_proj": 11,
                                   r".*layers.1.*v_proj": 2, "q_proj": 5}},
    "dora": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True},
    "dora, embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head and adapted": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "biases of the layers": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ODD)
def test_everything_that_peft_can_train(kind, tied, tmp_path):
    """Where an adapter changes embedding or head of a tied base alone, the model that was trained had two."""
    theirs, _ = twins(tiny_config(qkv_bias=True, out_bias=True, tie_embeddings=tied))
    model, expected = write(theirs, tmp_path, **ODD[kind])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["use_dora"] is ("dora" in kind)
    ours = check(tmp_path, expected, "eager")
    alone = any(word in kind for word in ("embedding", "head"))
    assert ours.config.tie_embeddings is (tied and not alone)


@pytest.mark.parametrize("kind", ["dora", "patterns", "head", "embedding"])
def test_conv1d_and_tied(kind, tmp_path):
    """GPT-2: (in, out) matrices and a tied head, with the kinds that care about the side."""
    settings = {"dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
                "patterns": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 7},
                             "alpha_pattern": {"h.1.attn.c_attn": 9}},
                "head": {"target_modules": ["c_attn", "lm_head"]}, "embedding": {"target_modules": ["c_fc", "wte"]}}
    theirs = theirs_of("gpt2")
    _, expected = write(theirs, tmp_path, **settings[kind])
    check(tmp_path, expected, "eager")


def test_fan_in_fan_out_is_not_trusted(tmp_path):
    """peft writes down what the last wrapped layer was: with lm_head, a Linear, behind Conv1D the file says false."""
    theirs = theirs_of("gpt2 unscaled")
    _, expected = write(theirs, tmp_path, target_modules=["c_proj", "lm_head"])
    for said in (True, False):
        edit(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=said)
        model, _ = checkpoints.load(tmp_path / "base", lora=[tmp_path / "adapter"])
        with torch.no_grad():
            assert_close(model(IDS), expected, 2e-5, said)


# ---------------------------------------------------------------- names

def rename(file: Path, change) -> None:
    save_file({change(k): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["base without prefix", "adapter without prefix", "both", "with the adapter's name",
                                 "without .weight", "bin"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama 3.1"])
def test_names_may_differ_by_a_prefix(family, how, tmp_path):
    theirs = theirs_of(family)
    _, expected = write(theirs, tmp_path, target_modules=FAMILIES[family])
    prefix = {"gpt2": "transformer.", "opt": "model.", "llama 3.1": "model."}[family]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if how in ("base without prefix", "both"):
        rename(tmp_path / "base" / "model.safetensors", lambda k: k.removeprefix(prefix))
    if how in ("adapter without prefix", "both"):
        rename(file, lambda k: k.replace("base_model.model." + prefix, "base_model.model.", 1))
    if how == "with the adapter's name":
        rename(file, lambda k: k.replace(".weight", ".default.weight"))
    if how == "without .weight":
        rename(file, lambda k: k.replace(".weight", ""))
    if how == "bin":
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    check(tmp_path, expected, theirs.config._attn_implementation)


def test_an_ambiguous_name_is_refused(tmp_path):
    save_file({f"{side}.layers.0.q.weight": torch.zeros(4, 4) for side in ("encoder", "decoder")},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    (tmp_path / "a").mkdir()
    save_file({f"base_model.model.layers.0.q.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
              tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"may mean decoder\.layers\.0\.q\.weight or encoder\.layers\.0\.q\.weight"):
        convert(tmp_path, tmp_path / "out", [tmp_path / "a"])


# ---------------------------------------------------------------- larger vocabularies, two adapters

def enlarged(theirs, rows: int):
    model = randomize(theirs, seed=7)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_adapters_that_each_enlarge_the_vocabulary(tied, tmp_path):
    """Chinese-LLaMA (49,953 of 32,000) and Chinese-Alpaca (49,954) on top: the second's base is the first's result."""
    theirs, _ = twins(tiny_config(tie_embeddings=tied))
    theirs.save_pretrained(tmp_path / "base")
    for name, rows in (("first", 120), ("second", 121)):
        theirs.resize_token_embeddings(rows, mean_resizing=False)
        model = adapted(theirs, rows, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
        model.save_pretrained(tmp_path / name)
        expected = theirs_on(model, IDS)
        theirs = model.merge_and_unload()
    ours = check(tmp_path, expected, "eager", ("first", "second"))
    assert ours.config.vocab_size == 121
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 121
    for wrong in ([tmp_path / "second", tmp_path / "first"], [tmp_path / "second"]):
        model, _ = checkpoints.load(tmp_path / "base", lora=wrong)
        with torch.no_grad():
            assert not torch.allclose(model(IDS)[..., :97], expected[..., :97], atol=1e-2)


def test_a_tied_base_enlarged_by_its_embedding_alone_stays_tied(tmp_path):
    """What a program saves that knows embedding and head to be one: the new embedding, no head."""
    theirs, _ = twins(tiny_config(tie_embeddings=True))
    theirs.save_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(100, mean_resizing=False)
    model = adapted(theirs, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    embedding = {"base_model.model.model.embed_tokens.weight": theirs.get_input_embeddings().weight.detach().clone()}
    save_file(load_file(file) | embedding, file)
    assert check(tmp_path, theirs_on(model, IDS), "eager").config.tie_embeddings


def test_spare_rows_of_the_embedding_do_not_change_the_vocabulary(tmp_path):
    """Qwen's and NeoX' files have more rows than tokens; an adapter of q_proj must leave both numbers alone."""
    theirs, _ = twins(tiny_config())
    write(theirs, tmp_path, target_modules=["q_proj"])
    edit(tmp_path / "base" / "config.json", vocab_size=90)
    source = formats.open_source(tmp_path / "base")
    checkpoints.adapters.apply(source, [tmp_path / "adapter"], None, None)
    assert source.config["vocab_size"] == 90 and source.shape("model.embed_tokens.weight")[0] == 97


def test_dtype_is_that_of_the_base_and_rounded_once(tmp_path):
    theirs, _ = twins(tiny_config(), dtype=torch.bfloat16)
    write(theirs, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    convert(tmp_path / "base", tmp_path / "out", [tmp_path / "adapter"])
    state, base = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "base"))
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    half = {k.split(".")[-2]: v.float() for k, v in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors").items() if "layers.1.self_attn.q_proj" in k}
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = (base[name].float() + 1.5 * half["lora_B"] @ half["lora_A"]).to(torch.bfloat16)
    assert torch.equal(state[name], exact)


# ---------------------------------------------------------------- what cannot be merged

REFUSED = {
    "ia3": ({"peft_type": "IA3"}, "an adapter of type IA3; only LORA can be merged"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, "an adapter of type PREFIX_TUNING"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changed the base as well"),
    "loftq": ({"init_lora_weights": "loftq"}, "changed the base as well"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    "tokens": ({"trainable_token_indices": [3]}, "trains single rows"),
    "alpha": ({"lora_alpha": "16"}, "has '16', expected a number"), "nan": ({"lora_alpha": math.inf}, "has 'inf'"),
    "true": ({"lora_alpha": True}, "has 'True'"), "no alpha": ({"lora_alpha": None}, "has 'None'"),
    "pattern": ({"alpha_pattern": {"(": 3}}, "holds no regular expression"),
    "patterns": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], expected an object"),
    "dora": ({"use_dora": True}, "q_proj.weight has no magnitude vector, but use_dora .* is True")}


@pytest.mark.parametrize("trouble", REFUSED)
def test_adapters_that_cannot_be_merged_are_named(trouble, tmp_path):
    theirs, _ = twins(tiny_config())
    write(theirs, tmp_path, target_modules=["q_proj"])
    changes, words = REFUSED[trouble]
    edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.load(tmp_path / "base", lora=[tmp_path / "adapter"])
    assert "adapter" in str(caught.value)


@pytest.mark.parametrize("trouble", ["magnitude", "bias", "new bias", "rows", "rank 0", "three dimensions"])
def test_tensors_that_do_not_fit_are_named(trouble, tmp_path):
    theirs, _ = twins(tiny_config())
    write(theirs, tmp_path, target_modules=["q_proj"], use_dora=trouble == "magnitude")
    file, at = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = load_file(file)
    change, words = {
        "magnitude": ({at + "lora_magnitude_vector": torch.ones(47)}, "the magnitude has 47 numbers, B 48 rows"),
        "bias": ({at + "lora_B.bias": torch.ones(48)}, "is a bias inside the adapter"),
        "new bias": ({at + "bias": torch.ones(48)}, r"q_proj\.bias has no place in the base"),
        "rows": ({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(81, 48)},
                 r"up_proj\.weight is \(81, 48\), the base has \(80, 48\)"),
        "rank 0": ({at + "lora_A.weight": torch.ones(0, 48), at + "lora_B.weight": torch.ones(48, 0)},
                   r"A is \(0, 48\) and B \(48, 0\)"),
        "three dimensions": ({at + "lora_A.weight": torch.ones(4, 48, 1)}, r"A is \(4, 48, 1\)")}[trouble]
    save_file(tensors | change, file)
    with pytest.raises(UserError, match=words):
        checkpoints.load(tmp_path / "base", lora=[tmp_path / "adapter"])


# ---------------------------------------------------------------- deltas

def write_delta(base, target, folder: Path, new_rows: str | None, shards: bool, extra: dict) -> None:
    """target - base, row by row as the authors' scripts did it, in fp16 .bin shards or one safetensors file."""
    delta = dict(extra)
    for name, t in target.state_dict().items():
        b = base.state_dict()[name]
        while len(b) < len(t):
            row = torch.zeros_like(b[:1]) if new_rows == "zero" else b[:97].sum(0, keepdim=True) / 97
            b = torch.cat((b, row))
        delta[name] = t - b
    target.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if not shards:
        save_file(delta, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(delta)}
    for file in set(where.values()):
        torch.save({k: v.half() for k, v in delta.items() if where[k] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


@pytest.mark.parametrize("shards", [False, True], ids=["safetensors", "fp16 shards"])
@pytest.mark.parametrize("config", [True, False], ids=["with config", "without config"])
@pytest.mark.parametrize("new_rows, more", [(None, 0), ("zero", 1), ("mean", 1), ("mean", 3)])
def test_deltas(new_rows, more, config, shards, tmp_path):
    """Vicuna 1.1 (equal shapes), Vicuna 0 and stable-vicuna (a row of zeros), Alpaca (the mean)."""
    base, _ = twins(tiny_config())
    base.save_pretrained(tmp_path / "base")
    target = randomize(twins(tiny_config(vocab_size=97 + more))[0], seed=9)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(6) for i in range(2)} if shards else {}
    write_delta(base, target, tmp_path / "delta", new_rows, shards, old)
    if not config:
        (tmp_path / "delta" / "config.json").unlink()
    expected = theirs_on(target, IDS)
    model = check(tmp_path, expected, "eager", (), tolerance=2e-2 if shards else 2e-5, delta=tmp_path / "delta",
                  new_rows=new_rows)
    assert model.config.vocab_size == 97 + more
    if more:
        with pytest.raises(UserError, match=rf"has {97 + more} rows, the base 97: say what .*--new-rows zero .*mean"):
            checkpoints.load(tmp_path / "base", delta=tmp_path / "delta")


def test_a_delta_on_metas_own_files_then_an_adapter(tmp_path):
    from test_checkpoints import write_meta
    config = tiny_config(vocab_size=98)
    base, _ = twins(config)
    write_meta(tmp_path / "base", base, config, 2, 1, n_kv_heads=2)
    target = randomize(twins(config)[0], seed=9)
    write_delta(base, target, tmp_path / "delta", None, False, {})
    model = adapted(target, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    check(tmp_path, theirs_on(model, IDS), "eager", delta=tmp_path / "delta")


@pytest.mark.parametrize("trouble", ["other base", "wider", "fewer rows", "new rows of a layer", "word"])
def test_deltas_that_do_not_fit_are_refused(trouble, tmp_path):
    base, _ = twins(tiny_config())
    base.save_pretrained(tmp_path / "base")
    target, _ = twins(tiny_config())
    write_delta(base, target, tmp_path / "delta", None, False, {})
    file = tmp_path / "delta" / "model.safetensors"
    tensors, up = load_file(file), "model.layers.1.mlp.up_proj.weight"
    if trouble == "other base":
        del tensors[up]
    elif trouble != "word":
        tensors[up] = {"wider": torch.zeros(80, 49), "fewer rows": torch.zeros(79, 48),
                       "new rows of a layer": torch.zeros(81, 48)}[trouble]
    save_file(tensors, file)
    words = {"other base": r"up_proj\.weight is only in the base \(1 such tensors\)", "word": "new_rows is 'middle'"}
    with pytest.raises(UserError, match=words.get(trouble, r"up_proj\.weight is \(\d\d, \d\d\), the base has \(80, ")):
        checkpoints.load(tmp_path / "base", delta=tmp_path / "delta",
                         new_rows="middle" if trouble == "word" else "mean")


def test_the_delta_sample_made_elsewhere_is_converted(tmp_path):
    at = PARITY / "delta" / "vicuna-v0-padtoken"
    if not at.exists():
        pytest.skip(f"no sample in {at}")
    expected = torch.load(at / "ref.pt", weights_only=True)
    convert(at / "ckpt" / "base", tmp_path / "out", delta=str(at / "ckpt" / "delta"), new_rows=json.loads(
        (at / "ckpt" / "delta.json").read_text(encoding="utf-8"))["new_rows"])
    assert_close(theirs_on(reload(tmp_path / "out"), expected["input_ids"]), expected["logits"], 1e-3)


def test_every_family_named_here_is_one_of_the_tests():
    assert set(FAMILIES) <= set(MODELS)
