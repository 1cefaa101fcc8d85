"""Every family against transformers: tiny random models with each switch that published ones use, written by
transformers, read by `load`; logits, padding, cached generation and the way back (`save`) must agree.
"""
import inspect
import json

import pytest
import torch
from conftest import error, random_ids, randomize

import checkpoints
import lora

SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GQA = {"intermediate_size": 80, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0], "long_factor": [1, 2, 3, 4, 5, 6.5],
        "rope_theta": 10000.0}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": None,
        "eos_token_id": None}
NEO = {k: v for k, v in SIZES.items() if k not in ("num_hidden_layers", "num_attention_heads")} | {
    "num_layers": 4, "num_heads": 4}
FALCON = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
MPT = {"vocab_size": 97, "d_model": 48, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}

# name: (transformers' class, its config). Sizes are all different, so that a mixed-up axis is a shape error.
MODELS = {
    "llama": ("Llama", SIZES | {"intermediate_size": 80, "rms_norm_eps": 1e-6}),
    "llama 3.1": ("Llama", SIZES | GQA | {"rope_parameters": LLAMA3}),
    "mistral 0.1": ("Mistral", SIZES | GQA | {"sliding_window": 7}),
    "mistral nemo": ("Mistral", SIZES | GQA | {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", SIZES | GQA | {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", SIZES | GQA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SIZES | GQA | {"head_dim": 20}),
    "smollm3": ("SmolLM3", SIZES | GQA | {"num_hidden_layers": 5}),
    "gpt2": ("GPT2", GPT2), "gpt2 inner": ("GPT2", GPT2 | {"n_inner": 100, "activation_function": "gelu"}),
    "gpt2 scaled": ("GPT2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 unscaled": ("GPT2", GPT2 | {"scale_attn_weights": False, "tie_word_embeddings": False}),
    "gpt_neo": ("GPTNeo", NEO | {"attention_types": [[["global", "local"], 2]], "window_size": 5}),
    "gptj": ("GPTJ", {k: v for k, v in GPT2.items()} | {"rotary_dim": 8}),
    "codegen": ("CodeGen", GPT2 | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 100, "rotary_pct": 0.34}),
    "redpajama": ("GPTNeoX", SIZES | {"intermediate_size": 100, "rotary_pct": 1.0, "use_parallel_residual": False}),
    "stablelm 3b": ("StableLm", SIZES | GQA | {"partial_rotary_factor": 0.5}),
    "stablelm 2 12b": ("StableLm", SIZES | GQA | {"use_parallel_residual": True, "qk_layernorm": True,
                                                  "use_qkv_bias": True, "partial_rotary_factor": 0.34}),
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 4}),
    "bloom 12 heads": ("Bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 12}),
    "bloom residual": ("Bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4,
                                 "apply_residual_connection_post_layernorm": True}),
    "mpt": ("Mpt", MPT | {"attn_config": {"alibi": True}}),
    "mpt clip": ("Mpt", MPT | {"n_heads": 6, "attn_config": {"alibi": True, "clip_qkv": 0.7, "softmax_scale": 0.4}}),
    "opt": ("OPT", SIZES | {"ffn_dim": 100}), "opt no bias": ("OPT", SIZES | {"ffn_dim": 100, "enable_bias": False}),
    "opt 350m": ("OPT", SIZES | {"ffn_dim": 100, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "starcoder": ("GPTBigCode", GPT2), "bigcode heads": ("GPTBigCode", GPT2 | {"multi_query": False, "n_inner": 90}),
    "starcoder2": ("Starcoder2", SIZES | GQA | {"sliding_window": 6}),
    "falcon 7b": ("Falcon", FALCON), "falcon 40b": ("Falcon", FALCON | {"new_decoder_architecture": True,
                                                                        "num_kv_heads": 2}),
    "falcon 11b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100,
                                       "num_ln_in_parallel_attn": 1}),
    "falcon rw": ("Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gemma": ("Gemma", SIZES | GQA | {"head_dim": 20}),
    "gemma2": ("Gemma2", SIZES | GQA | {"head_dim": 20, "sliding_window": 6, "query_pre_attn_scalar": 17,
                                        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2 uncapped": ("Gemma2", SIZES | GQA | {"head_dim": 20, "attn_logit_softcapping": None,      # null in the file
                                                 "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", SIZES | GQA | {"head_dim": 20, "sliding_window": 6, "num_hidden_layers": 7}),
    "phi": ("Phi", SIZES | {"intermediate_size": 100, "partial_rotary_factor": 0.5}),
    "phi norms": ("Phi", SIZES | {"intermediate_size": 100, "partial_rotary_factor": 0.34, "qk_layernorm": True}),
    "phi3": ("Phi3", SIZES | GQA | {"sliding_window": 9}),
    "phi3 long": ("Phi3", SIZES | GQA | {"max_position_embeddings": 128, "original_max_position_embeddings": 64,
                                         "rope_parameters": LONG}),
    "phi4 mini long": ("Phi3", SIZES | GQA | {"max_position_embeddings": 128, "original_max_position_embeddings": 64,
                                              "rope_parameters": LONG | {"partial_rotary_factor": 0.5, "short_factor": [
                                                  1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 3.0]}}),
    "phi4 mini": ("Phi3", SIZES | GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                             "partial_rotary_factor": 0.5}}),
    "olmo": ("Olmo", SIZES | GQA | {"clip_qkv": 0.8}), "olmo2": ("Olmo2", SIZES | GQA),
    "glm4 9b": ("Glm", SIZES | GQA | {"head_dim": 20}), "glm4 0414": ("Glm4", SIZES | GQA | {"head_dim": 20}),
    "openai-gpt": ("OpenAIGPT", GPT2),
    "helium": ("Helium", SIZES | GQA | {"head_dim": 12, "attention_bias": True}),
    "seed oss": ("SeedOss", SIZES | GQA | {"head_dim": 20}),
    "arcee": ("Arcee", SIZES | GQA | {"mlp_bias": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "nanochat": ("NanoChat", SIZES | {"intermediate_size": 100, "num_key_value_heads": 2})}
HEADS = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}
IDS = random_ids(2, 40)
TOLERANCE = 7e-6                          # relative to the largest logit; the largest error seen is 3.5e-6


def theirs_of(name: str):
    return randomize(built(*MODELS[name]), seed=3)


def built(kind: str, config: dict):
    import transformers
    made = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else kind + "Config")(**config)
    # Their plain attention adds Falcon's ALiBi twice; a padded Gemma 2 needs the plain one for its soft caps.
    made._attn_implementation = "sdpa" if kind == "Falcon" else "eager"
    return getattr(transformers, HEADS.get(kind, kind + "ForCausalLM"))(made).eval()


@torch.no_grad()
def theirs_on(model, ids, mask=None):
    more = {}
    if mask is not None:
        more["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            more["position_ids"] = ((mask.cumsum(1) - 1) * mask).clamp(min=0)
    return model(ids, **more).logits


def greedy(model, ids, n):
    """Without any cache: the longest, surest way."""
    for _ in range(n):
        ids = torch.cat((ids, theirs_on(model, ids)[:, -1:].argmax(-1)), dim=1)
    return ids[:, -n:]


SAID = {"num_key_value_heads", "intermediate_size", "ffn_dim", "rotary_dim", "attention_types", "n_embd", "n_layer",
        "n_head", "n_positions", "num_layers", "num_heads", "d_model", "n_heads", "n_layers", "max_seq_len", *SIZES}


@pytest.mark.parametrize("name", {kind: name for name, (kind, _) in reversed(MODELS.items())}.values())
def test_what_a_config_leaves_out_is_what_transformers_takes_it_for(name, tmp_path):
    """A config.json of sizes alone, as in files of 2022 or in a hurry."""
    kind, config = MODELS[name]
    said = {k: v for k, v in config.items() if k in SAID}
    if "num_attention_heads" in said:                        # 16 numbers to a head: a quarter of them can turn
        said |= {"num_attention_heads": 3, **({"num_key_value_heads": 3} if "num_key_value_heads" in said or
                                              kind in ("StableLm", "Phi") else {}),
                 **({"head_dim": 16} if kind == "Helium" else {})}             # its o_proj cannot have another
    theirs = randomize(built(kind, said), seed=3)
    theirs.save_pretrained(tmp_path)
    raw = {k: v for k, v in said.items() if v is not None} | {"model_type": theirs.config.model_type}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with torch.no_grad():
        found = error(checkpoints.load(tmp_path)[0](IDS), theirs_on(theirs, IDS))
    assert found < 2e-5, f"{name}: {found:.1e}"                                # heads of 256 numbers add up differently


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    theirs, folder = theirs_of(request.param), tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return request.param, theirs, checkpoints.load(folder)[0], folder


def test_logits(pair):
    name, theirs, ours, _ = pair
    with torch.no_grad():
        found = error(ours(IDS), theirs_on(theirs, IDS))
    assert found < TOLERANCE, f"{name}: {found:.1e}"


def test_long_texts_take_the_library_path(pair, monkeypatch):
    import model
    monkeypatch.setattr(model, "SHORT", 0)
    name, theirs, ours, _ = pair
    with torch.no_grad():
        assert error(ours(IDS), theirs_on(theirs, IDS)) < TOLERANCE, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    name, theirs, ours, _ = pair
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[1, :9] = 0
    mask = mask if side == "left" else mask.flip(1)
    ids = IDS[:, :23]
    with torch.no_grad():
        got, alone = ours(ids, mask), ours(ids[1:][:, mask[1] > 0])
        assert error(got[1][mask[1] > 0], alone[0]) < TOLERANCE, name
        if side == "left":
            expected = theirs_on(theirs, ids, mask)
            assert error(got[mask > 0], expected[mask > 0]) < TOLERANCE, name


def test_greedy_text(pair):
    name, theirs, ours, _ = pair
    expected = greedy(theirs, IDS[:, :9], 12)
    assert ours.generate(IDS[:, :9], 12, temperature=0.0).tolist() == expected.tolist(), name
    ids = torch.cat((torch.full((2, 3), 5), IDS[:, :9]), dim=1)                # left-padded, with a cache
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    assert ours.generate(ids, 12, mask, temperature=0.0).tolist() == expected.tolist(), name


@pytest.mark.parametrize("pads", [0, 3])
def test_a_text_that_outgrows_the_trained_length_while_it_is_written(pads, tmp_path):
    """longrope has other divisors from then on, also for what is in the cache: as without a cache."""
    theirs = randomize(built("Phi3", SIZES | GQA | {
        "max_position_embeddings": 128, "original_max_position_embeddings": 14, "rope_parameters": LONG}), seed=3)
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load(tmp_path)[0]
    expected = greedy(theirs, IDS[:, :9], 12)
    ids, mask = torch.full((2, 9 + pads), 5), torch.zeros(2, 9 + pads, dtype=torch.int64)
    ids[:, pads:], mask[:, pads:] = IDS[:, :9], 1
    assert ours.generate(ids, 12, mask, temperature=0.0).tolist() == expected.tolist()
    # A row that has ended is dropped on the way; the other one goes on as if nothing had happened.
    end = int(expected[0, 3])
    assert end not in expected[1].tolist()
    assert ours.generate(ids, 12, mask, temperature=0.0, eos_ids=[end])[1].tolist() == expected[1].tolist()


def test_adapters_are_pefts(pair, tmp_path):
    """One adapter on every linear: our live one, peft's on their model, merged at load, and loaded again."""
    import peft
    name, theirs, ours, folder = pair
    lora.apply(ours, 3, 6.0, name="a")
    for i, (_, p) in enumerate(lora.parameters(ours, "a")):
        p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    lora.save(ours, "a", tmp_path, base=str(folder))
    with torch.no_grad(), lora.use(ours, "a"):
        expected = ours(IDS)
    lora.strip(ours)
    with torch.no_grad():
        assert error(ours(IDS), expected) > 1e-3, "the adapter does nothing: the example tests nothing"
        assert error(checkpoints.load(folder, lora=[tmp_path])[0](IDS), expected) < 5e-5, name
        lora.load(ours, tmp_path, "again")
        assert {len(m.lora_A["again"]) for _, m in lora.layers(ours)} == {3}   # q, k and v are three again
        with lora.use(ours, "again"):
            assert error(ours(IDS), expected) < TOLERANCE, name
        lora.strip(ours)
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
        found = error(theirs_on(adapted, IDS), expected)
        adapted.unload()
        assert found < 5e-5, f"{name}: {found:.1e}"


def test_the_way_back(pair, tmp_path):
    """save writes a directory that transformers reads as the same model, and so do we."""
    import transformers
    name, theirs, ours, _ = pair
    with torch.no_grad():
        for p in ours.parameters():                                            # as if trained: not what was read
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        checkpoints.save(ours, None, tmp_path)
        again = checkpoints.load(tmp_path)[0]
        assert error(again(IDS), ours(IDS)) < 1e-6, name
        if json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "chatpixiu":
            assert name == "opt 350m"                                          # its embedding was multiplied out
            return
        kind = type(theirs)
        how = {"attn_implementation": "sdpa" if "Falcon" in kind.__name__ else "eager"}
        their_copy = kind.from_pretrained(tmp_path, **how).eval()
        assert error(theirs_on(their_copy, IDS), ours(IDS)) < TOLERANCE, name
        assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), type(theirs.config))
