"""`convert` and `show`: what goes in is written by transformers (or after the originals' formats), what comes out is
read by transformers, and the two must agree to the last bit where nothing was merged.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close, byte_tokenizer, random_ids, randomize, tiny_config, tiny_model, twins
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import IDS, MODELS, theirs_of, theirs_on

import checkpoints
from checkpoints import __main__ as command
from checkpoints import export, formats, others
from checkpoints.convert import convert
from common import UserError

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT.parent / "shared" / "parity"


def reload(folder: Path, attention: str = "sdpa"):
    """What transformers makes of a directory; it may not miss, add or guess a single tensor."""
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation=attention)
    assert not any(info.values()), {k: v for k, v in info.items() if v}
    return model.eval()


def edit(path: Path, **changes) -> dict:
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")
    return data


@pytest.fixture
def saved(tmp_path):
    theirs, _ = twins(tiny_config())
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", theirs


# ---------------------------------------------------------------- every family, in its own names

@pytest.mark.parametrize("name", MODELS)
def test_every_family_goes_through_unchanged(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    again = reload(tmp_path / "out", theirs.config._attn_implementation)
    assert torch.equal(theirs_on(again, IDS), theirs_on(theirs, IDS))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gptj"])
def test_old_shards_of_fp16_with_their_masks(name, tmp_path):
    """pytorch_model-0000N-of-00002.bin, masks and tables among the weights: they go along, the dtype stays."""
    theirs = theirs_of(name).half()
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    state = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or name == "gptj"}
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    where = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(state)}
    for file in set(where.values()):
        torch.save({k: v for k, v in state.items() if where[k] == file}, tmp_path / "in" / file)
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    said = convert(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k].cpu()) for k in state)
    assert "1 F32" in said and f"{len(state) - 1} F16" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtype(dtype, saved, tmp_path):
    folder, theirs = saved
    done = command.main(["convert", str(folder), str(tmp_path / "out"), "--dtype", dtype])
    assert done is None
    kind = command.DTYPES[dtype]
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == kind and torch.equal(tensor, theirs.state_dict()[key].to(kind)), key
    assert reload(tmp_path / "out").dtype == kind


def test_what_fp16_cannot_hold_is_refused_and_nothing_is_left_that_loads(saved, tmp_path):
    folder, theirs = saved
    with torch.no_grad():
        theirs.model.norm.weight[3] = 1e5
    theirs.save_pretrained(folder)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is not finite as F16: .*--dtype bf16"):
        convert(folder, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(UserError):
        checkpoints.load(tmp_path / "out")


def test_shards_and_index(saved, tmp_path, monkeypatch):
    folder, theirs = saved
    monkeypatch.setattr(export, "SHARD", 40_000)
    convert(folder, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(files) == len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in theirs.state_dict().values())
    assert all(f.stat().st_size < 50_000 for f in files)
    assert torch.equal(theirs_on(reload(tmp_path / "out", theirs.config._attn_implementation), IDS),
                       theirs_on(theirs, IDS))


def test_tensors_are_aligned_whatever_their_types(tmp_path):
    """One byte, then two, then eight: wide types must come first in the file."""
    (tmp_path / "in").mkdir()
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(7),
               "d": torch.ones(2, 0), "e": torch.rand(3, 1, 2)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "remote"}', encoding="utf-8")
    convert(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, t in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == t.dtype and torch.equal(got, t) and got.data_ptr() % t.element_size() == 0, name


def test_killed_while_converting_leaves_nothing_that_loads(saved, tmp_path, monkeypatch):
    folder, _ = saved
    count = 0

    def read(self, name):
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return self.entries[name].read()

    monkeypatch.setattr(formats.Source, "read", read)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors.tmp"]
    with pytest.raises(UserError):
        checkpoints.load(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_in_the_config_and_another_head_in_the_file(tied, tmp_path):
    theirs, _ = twins(tiny_config(tie_embeddings=tied))
    theirs.save_pretrained(tmp_path / "in")
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, tmp_path / "in" / "model.safetensors")
    edit(tmp_path / "in" / "config.json", tie_word_embeddings=True)
    convert(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is tied
    assert torch.equal(theirs_on(reload(tmp_path / "out", theirs.config._attn_implementation), IDS),
                       theirs_on(theirs, IDS))


# ---------------------------------------------------------------- what else lies in the directory

def test_tokenizer_generation_config_and_remote_code_go_along(tmp_path):
    """ChatGLM lives from the code beside its weights: nothing of it is run, all of it is copied, no name changes."""
    source = tmp_path / "in"
    source.mkdir()
    tensors = {"transformer.word_embeddings.weight": torch.rand(9, 4), "transformer.layers.0.x.weight": torch.rand(4)}
    save_file(tensors, source / "model.safetensors")
    config = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLM"}, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files = {"modeling_chatglm.py": "raise SystemExit('run')", "tokenization_chatglm.py": "x", "ice_text.model": "m",
             "generation_config.json": "{}", "README.md": "not this"}
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8")
    assert "no tokenizer" not in convert(source, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == {
        **config, "torch_dtype": "bfloat16"}
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    for name, text in files.items():
        there = tmp_path / "out" / name
        assert there.read_text(encoding="utf-8") == text if name != "README.md" else not there.exists()


def test_the_last_adapter_with_a_tokenizer_brings_it(saved, tmp_path):
    from peft import LoraConfig, get_peft_model
    folder, theirs = saved
    (folder / "tokenizer.json").write_text("base", encoding="utf-8")
    (folder / "merges.txt").write_text("base", encoding="utf-8")
    model = get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj"]))
    for name in ("first", "second", "third"):
        model.save_pretrained(tmp_path / name)
    for name in ("first", "second"):
        (tmp_path / name / "tokenizer.model").write_text(name, encoding="utf-8")
    convert(folder, tmp_path / "out", [tmp_path / n for n in ("first", "second", "third")])
    assert (tmp_path / "out" / "tokenizer.model").read_text(encoding="utf-8") == "second"
    assert not (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "merges.txt").exists()


# ---------------------------------------------------------------- other formats: Meta, Mistral, nanoGPT, llama2.c

def meta_state(theirs, config) -> dict:
    from test_checkpoints import META, pairs
    state = {}
    for name, w in theirs.state_dict().items():
        path = name.removeprefix("model.").removesuffix(".weight")
        layer, kind = (".".join(path.split(".")[:2]) + ".", path.split(".", 2)[2]) if path.startswith("layers") else (
            "", path)
        if kind.endswith(("q_proj", "k_proj")):
            w = pairs(w, config.num_heads if kind.endswith("q_proj") else config.num_kv_heads)
        state[f"{layer}{META[kind]}.weight"] = w.clone()
    return state


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_meta_files_to_hugging_face(shards, tmp_path):
    from test_checkpoints import write_meta
    config = tiny_config(vocab_size=96, num_heads=8, num_kv_heads=8, hidden_size=64, intermediate_size=80)
    theirs, _ = twins(config)
    write_meta(tmp_path / "meta", theirs, config, shards, 1, n_kv_heads=8)
    convert(tmp_path / "meta", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items()) and len(state) == 21
    assert_close(theirs_on(reload(tmp_path / "out"), IDS % 96), theirs_on(theirs, IDS % 96))


def test_shards_of_two_models_are_refused(tmp_path):
    from test_checkpoints import write_meta
    config = tiny_config(vocab_size=98)
    theirs, _ = twins(config)
    write_meta(tmp_path / "meta", theirs, config, 2, 1, n_kv_heads=2)
    file = tmp_path / "meta" / "consolidated.01.pth"
    state = torch.load(file, weights_only=True)
    state["layers.1.attention.wo.weight"] = torch.rand(40, 24)
    torch.save(state, file)
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wo\.weight is \(48, 24\), \(40, 24\) in the 2 shards"):
        checkpoints.load(tmp_path / "meta")
    del state["layers.1.attention.wo.weight"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"tensor layers\.1\.attention\.wo\.weight is not in consolidated\.01\.pth"):
        checkpoints.load(tmp_path / "meta")


@pytest.mark.parametrize("window", [None, 7])
def test_mistral_files(window, tmp_path):
    """consolidated.safetensors with params.json: Meta's names, D of its own, and in version 0.1 a window."""
    from transformers import MistralConfig, MistralForCausalLM
    theirs = randomize(MistralForCausalLM(MistralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=20,
        num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=window,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, attn_implementation="eager"))).eval()
    folder = tmp_path / "mistral"
    folder.mkdir()
    save_file(meta_state(theirs, tiny_config(num_kv_heads=2)), folder / "consolidated.safetensors")
    params = {"dim": 48, "n_layers": 2, "head_dim": 20, "hidden_dim": 80, "n_heads": 4, "n_kv_heads": 2,
              "norm_eps": 1e-5, "vocab_size": 97, "rope_theta": 1e6, "sliding_window": window}
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    model, _ = checkpoints.load(folder)
    with torch.no_grad():
        assert_close(model(IDS), theirs_on(theirs, IDS))
    (folder / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")      # Mistral has one, too
    assert formats.open_source(folder).config["head_dim"] == 20
    convert(folder / "consolidated.safetensors", tmp_path / "out")
    assert_close(theirs_on(reload(tmp_path / "out"), IDS), theirs_on(theirs, IDS))
    (folder / "params.json").unlink()
    with pytest.raises(UserError, match="no params.json, which says how many heads"):
        checkpoints.load(folder / "consolidated.safetensors")


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_files(bias, tmp_path):
    """nanoGPT's own ckpt.pt: Linear instead of Conv1D, exact GELU, compiled names, biases perhaps left out."""
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = randomize(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64,
                                                  activation_function="gelu"))).eval()
    state = {}
    for name, p in theirs.state_dict().items():
        linear = any(f".{kind}.weight" in name for kind in ("c_attn", "c_proj", "c_fc"))
        if not bias and name.endswith(".bias"):
            p.zero_()
            continue
        state["_orig_mod." + name] = p.T.contiguous() if linear else p
    state |= {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    args = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 64, "bias": bias, "vocab_size": 97, "dropout": 0.0}
    whole = {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(2.5), "config": {"lr": 1}}
    (tmp_path / "run").mkdir()
    torch.save(whole, tmp_path / "run" / "ckpt.pt")
    for path in (tmp_path / "run", tmp_path / "run" / "ckpt.pt"):
        model, _ = checkpoints.load(path)
        with torch.no_grad():
            assert_close(model(IDS), theirs_on(theirs, IDS))
    convert(tmp_path / "run", tmp_path / "out")
    assert torch.equal(theirs_on(reload(tmp_path / "out", theirs.config._attn_implementation), IDS),
                       theirs_on(theirs, IDS))
    for key in ("model_args", "n_head"):
        torch.save({k: v if k != "model_args" else {**args, "n_head": None} for k, v in whole.items() if k != key},
                   tmp_path / "run" / "ckpt.pt")
        with pytest.raises(UserError, match="when nanoGPT wrote it" if key == "model_args" else "n_head is None"):
            checkpoints.load(tmp_path / "run")


@pytest.mark.parametrize("magic, words", [(20240326, "an llm.c model"), (0x616b3432, "version 1 or 2")])
def test_relatives_of_llama2c_are_named(magic, words, tmp_path):
    (tmp_path / "model.bin").write_bytes(magic.to_bytes(4, "little") + bytes(1020))
    with pytest.raises(UserError, match=words + ".*only llama2.c's version 0 is read"):
        checkpoints.load(tmp_path / "model.bin")


def test_an_index_of_mistral_does_not_hide_that_of_the_model(saved, tmp_path):
    folder, theirs = saved
    theirs.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    (folder / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "consolidated-1.safetensors"}}',
                                                                encoding="utf-8")
    model, _ = checkpoints.load(folder)
    with torch.no_grad():
        assert_close(model(IDS), theirs_on(theirs, IDS))


# ---------------------------------------------------------------- no decoders, and samples made elsewhere

@pytest.mark.parametrize("kind, own_head", [("v1.0", False), ("v1.1", True), ("mt5", True), ("mt5", False)])
def test_t5(kind, own_head, tmp_path):
    from test_t5 import ask, theirs
    from transformers import AutoModelForSeq2SeqLM
    reference = theirs(tmp_path / "in", kind, own_head=own_head, decoder_start_token_id=3)
    convert(tmp_path / "in", tmp_path / "out")
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    answer = random_ids(2, 4, seed=1)
    assert torch.equal(ask(again.eval(), IDS, None, answer), ask(reference, IDS, None, answer))
    ours, _ = checkpoints.load(tmp_path / "out")
    with torch.no_grad():
        assert_close(ours(IDS, decoder_ids=answer), ask(reference, IDS, None, answer), 2e-5)


@pytest.mark.parametrize("file", ["transformers'", "BlinkDL's"])
def test_rwkv(file, tmp_path):
    from test_rwkv import ask, theirs
    reference = theirs(tmp_path / "in")
    base = tmp_path / "in"
    if file == "BlinkDL's":
        state = reference.state_dict()
        for theirs_, ours in others.BLINKDL.items():
            back = theirs_.replace("\\", "").strip("^$"), ours.replace("rwkv.", "")
            state = {n.replace(back[1], back[0]).removeprefix("rwkv."): t for n, t in state.items()}
        base = tmp_path / "RWKV-4-Small-ctx64.pth"
        torch.save(state, base)
    convert(base, tmp_path / "out")
    assert_close(ask(reload(tmp_path / "out", "eager"), IDS), ask(reference, IDS), 1e-6)


@pytest.mark.parametrize("at", sorted(PARITY.glob("*/*/ckpt")) or [None], ids=str)
def test_samples_made_elsewhere_are_converted(at, tmp_path):
    """With adapter or delta where one lies beside; transformers reads the outcome if it has the family, else we do."""
    from transformers import AutoConfig
    if at is None or not (reference := torch.load(at.parent / "ref.pt", weights_only=True)):
        pytest.skip(f"no samples in {PARITY}" if at is None else "a sample of what must not load")
    more = {"delta": at / "delta", "new_rows": "zero"} if (at / "delta").exists() else {
        "lora": [at / "adapter"] if (at / "adapter").exists() else []}
    convert(at / "base" if (at / "base").exists() else at, tmp_path / "out", dtype=torch.float32, **more)
    with torch.no_grad():
        try:
            AutoConfig.from_pretrained(tmp_path / "out")
            public = at.parent.parent.name != "glm10b"                         # another GLM than transformers' own
        except ValueError:
            public = False
        logits = theirs_on(reload(tmp_path / "out", "eager"), reference["input_ids"]) if public else checkpoints.load(
            tmp_path / "out")[0](reference["input_ids"])
    assert_close(logits, reference["logits"], 2e-5)


LEFTOVERS = ("training_args.bin", "optimizer.pt", "rng_state_0.pth",
             "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("name, wrapper", [
    ("codegeex_13b.pt", "module"), ("mp_rank_00_model_states.pt", "module"), ("anything.pth", None),
    ("last.ckpt", "state_dict"), ("weights.bin", "model"), ("other.safetensors", None)])
def test_one_file_of_any_name_beside_its_config(name, wrapper, saved, tmp_path):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    state = theirs.state_dict()
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save({wrapper: state} if wrapper else state, folder / name)
    for other in LEFTOVERS:
        (folder / other).write_bytes(b"what a training left behind")
    for path in (folder, folder / name):
        with torch.no_grad():
            assert_close(checkpoints.load(path)[0](IDS), theirs_on(theirs, IDS))
    convert(folder, tmp_path / "out")
    assert_close(theirs_on(reload(tmp_path / "out"), IDS), theirs_on(theirs, IDS))
    torch.save({}, folder / "another.pt")
    with pytest.raises(UserError, match=rf"2 files that may be its weights: name the one.*{name}"):
        checkpoints.load(folder)
    with torch.no_grad():
        assert_close(checkpoints.load(folder / name)[0](IDS), theirs_on(theirs, IDS))
    (folder / "another.pt").unlink()
    (folder / name).unlink()
    with pytest.raises(UserError, match="no weights .* it has config.json"):
        checkpoints.load(folder)


# ---------------------------------------------------------------- what cannot be converted

def test_packed_weights_are_named(saved, tmp_path):
    folder, _ = saved
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"packed by 'gptq'; of quantised files only GGUF is read"):
        convert(folder, tmp_path / "out")


def test_unknown_storage_types_are_named(saved, tmp_path):
    folder, theirs = saved
    state = {k: v.to(torch.complex64) if k == "model.norm.weight" else v for k, v in theirs.state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is stored as torch\.complex64"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("what", ["full", "file"])
def test_nothing_is_overwritten(what, saved, tmp_path):
    folder, _ = saved
    (tmp_path / "out").mkdir() if what == "full" else (tmp_path / "out").write_text("x", encoding="utf-8")
    if what == "full":
        (tmp_path / "out" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert(folder, tmp_path / "out")


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, threading, time
from pathlib import Path
from checkpoints.convert import convert

def private():
    return 1024 * int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))

convert(sys.argv[2], Path(sys.argv[3]) / "a")
before, most = private(), 0

def watch():
    global most
    while True:
        most = max(most, private() - before)
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], Path(sys.argv[3]) / "b", [sys.argv[4]])
time.sleep(0.02)
print(most)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_converting_needs_one_tensor(tmp_path):
    """80 MB of bf16 with an adapter on every layer: the largest tensor in fp32, its product, and its rounded copy."""
    from peft import LoraConfig, get_peft_model
    config = tiny_config(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_layers=9, head_dim=64,
                         num_heads=8)
    theirs, _ = twins(config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "big")
    twins(tiny_config())[0].save_pretrained(tmp_path / "small")
    adapter = randomize(get_peft_model(theirs, LoraConfig(r=4, target_modules="all-linear")))
    adapter.save_pretrained(tmp_path / "adapter")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-c", MEASURE, *(tmp_path / n for n in ("big", "small", "out", "adapter"))]
    done = subprocess.run(command_line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 4 * 2048 * 512
    assert int(done.stdout) < 3 * largest + 10e6, f"{int(done.stdout) / 1e6:.0f} MB"


# ---------------------------------------------------------------- show

def shown(path, capsys, monkeypatch) -> str:
    """`show` with a loader that may not read a single tensor of the weights."""
    real = formats.Entry.__init__

    def init(self, shape, read, *rest, **more):
        def never():
            raise AssertionError("show reads a tensor")
        real(self, shape, never, *rest, **more)

    monkeypatch.setattr(formats.Entry, "__init__", init)
    command.main(["show", str(path)])
    monkeypatch.undo()
    return capsys.readouterr().out


def test_show_a_directory(saved, capsys, monkeypatch):
    folder, theirs = saved
    byte_tokenizer(folder)
    out = shown(folder, capsys, monkeypatch)
    n = sum(p.numel() for p in theirs.parameters())
    for words in ("llama LlamaForCausalLM", f"{n:,}", "vocab_size=97", "num_kv_heads=2", "theta 10000, no scaling",
                  "ByteBPE, 259 tokens", "a Jinja template", "21 tensors in 1 file(s) (model.safetensors)", "21 F32",
                  "Hugging Face, safetensors", "2 x model.layers.0..1.mlp.up_proj.weight"):
        assert words in out, (words, out)


def test_show_other_formats(tmp_path, capsys, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from test_checkpoints import write_meta
    config = tiny_config(vocab_size=98)
    theirs, _ = twins(config)
    write_meta(tmp_path / "meta", theirs, config, 2, 1, n_kv_heads=2)
    out = shown(tmp_path / "meta", capsys, monkeypatch)
    assert "Meta's names, pickle (its code is never run)" in out
    assert "21 tensors in 1 file(s) (consolidated.00.pth)" in out and "model.embed_tokens.weight" in out, out
    get_peft_model(theirs, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], use_rslora=True)).save_pretrained(
        tmp_path / "adapter")
    out = shown(tmp_path / "adapter", capsys, monkeypatch)
    for words in ("LORA, r=3, lora_alpha=7, use_rslora", "q_proj", "4 tensors in 1 file(s) (adapter_model.safetensors)",
                  "576", "2 x base_model.model.model.layers.0..1.self_attn.q_proj.lora_A.weight"):
        assert words in out, (words, out)
    theirs_of("bloom").save_pretrained(tmp_path / "packed")
    edit(tmp_path / "packed" / "config.json", quantization_config={"quant_method": "awq"}, model_type="unheard of")
    out = shown(tmp_path / "packed", capsys, monkeypatch)
    assert "cannot be loaded" in out and "'unheard of'" in out and "awq" in out, out
    size = 4 * sum(p.numel() for p in theirs_of("bloom").parameters())
    assert f"fp32 {size / 1e3:.3g} KB, bf16 {size / 2e3:.3g} KB" in out, out


def test_show_layers_that_differ(saved, capsys, monkeypatch):
    """One tensor too many is seen with its number, gaps are not covered up."""
    folder, theirs = saved
    state = theirs.state_dict()
    more = {f"model.layers.{i}.x": torch.ones(3) for i in (0, 2, 3)}
    more |= {"model.layers.7.y": torch.ones(2), "z": torch.ones(4)}
    save_file(state | more, folder / "model.safetensors")
    out = shown(folder, capsys, monkeypatch)
    for words in ("3 x model.layers.*.x ", " model.layers.7.y ", " z "):
        assert words in out, (words, out)


def test_show_a_vocabulary_and_what_its_name_tells(saved, tmp_path, capsys, monkeypatch):
    folder, _ = saved
    byte_tokenizer(tmp_path / "tokens")
    with pytest.raises(UserError, match="is no checkpoint"):
        command.main(["show", str(tmp_path / "tokens")])
    assert "ByteBPE, 259 tokens" in capsys.readouterr().out
    folder.rename(tmp_path / "vicuna-7b-v1.5")
    assert "vicuna, to go by its name" in shown(tmp_path / "vicuna-7b-v1.5", capsys, monkeypatch)


def test_show_on_the_command_line(saved):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "checkpoints", "show", saved[0]], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stdout, done


@pytest.mark.parametrize("sample", sorted(p.parent.name for p in PARITY.glob("*/*/ckpt")) or ["none"])
def test_samples_made_elsewhere_are_shown(sample, capsys, monkeypatch):
    if sample == "none":
        pytest.skip(f"no samples in {PARITY}")
    for at in PARITY.glob(f"*/{sample}/ckpt"):
        for folder in [at] if not (at / "base").exists() else [p for p in at.iterdir() if p.is_dir()]:
            if at.parent.parent.name != "rwkv":
                assert "tensors in" in shown(folder, capsys, monkeypatch)


def test_ours_is_converted_too(tmp_path):
    """What export.py writes for a model of no public family: convert copies it, load reads it."""
    model = tiny_model(positions="alibi")
    checkpoints.save(model, None, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", dtype=torch.float32)
    again, _ = checkpoints.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(random_ids(2, 9)), model(random_ids(2, 9)))
