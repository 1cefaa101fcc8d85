"""The files of families that transformers lacks, or that were published under other names than it writes today: random
tensors by the names and in the shapes of the published files, with a config.json in the family's own words.

A reference takes such tensors and gives logits: either transformers' model of the same shape, after a few lines here
that undo the family's way to store them, or tests/reference.py. So it also reads what `save` has written.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import reference
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
V, C, H, D, K, I, L = 97, 48, 4, 12, 2, 80, 3                                  # noqa: E741  (sizes as in test_families)


@dataclass
class Case:
    raw: dict                                                  # config.json
    shapes: dict[str, tuple[int, ...]]                         # of the file's tensors
    reference: Callable[[State], Callable[[list[int]], Tensor]]        # tensors -> (one text -> (T, V) logits)
    texts: list[list[int]] = field(default_factory=lambda: [words(40, 1), words(40, 2)])
    prompts: list[list[int]] = field(default_factory=lambda: [words(9, 3), words(4, 4), words(12, 5)])
    junk: dict[str, Tensor] = field(default_factory=dict)      # what old files hold beside the weights
    form: str = "safetensors"                                  # or bin, fp16 shards, nested
    generate: bool = True
    back: str = "own"          # save writes the family's own layout; else the model_type that it falls back to


def words(n: int, seed: int) -> list[int]:
    return torch.randint(12, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def tensors(case: Case, seed: int = 3) -> State:
    """Random, with std 0.2; what belongs to a norm is around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in case.shapes.items():
        norm = any(part in name for part in ("norm", "ln", "lm_head.ln"))
        state[name] = torch.randn(shape, generator=generator) * 0.2 + float(norm and name.endswith("weight"))
    return state


def write(case: Case, folder: Path, state: State) -> None:
    (folder / "config.json").write_text(json.dumps(case.raw), encoding="utf-8")
    everything = {**state, **case.junk}
    if case.form == "safetensors":
        save_file(everything, folder / "model.safetensors")
    elif case.form == "nested":
        torch.save({"module": nested(everything)}, folder / "pytorch_model.bin")
    elif case.form == "bin":
        torch.save(everything, folder / "pytorch_model.bin")
    else:
        names = sorted(everything)
        files = {n: f"pytorch_model-0000{1 + (i > len(names) // 2)}-of-00002.bin" for i, n in enumerate(names)}
        for file in set(files.values()):
            torch.save({n: everything[n].half() for n in names if files[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def nested(state: State) -> dict:
    """language_model.transformer.x -> tables in tables, down to the transformer: as CodeGeeX's file is."""
    out: dict = {}
    for name, tensor in state.items():
        *path, last = name.split(".") if "transformer." not in name else name.split(".", 2)
        table = out
        for part in path:
            table = table.setdefault(part, {})
        table[last] = tensor
    return out


# ---------------------------------------------------------------- transformers as a reference

def twin(kind: str, config: dict, undo: Callable[[State], State], change: Callable | None = None):
    """undo: the file's tensors -> transformers' own, by name."""
    import transformers
    heads = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}
    ending = "TextConfig" if kind == "Gemma3" else "Config"

    def build(state: State) -> Callable[[list[int]], Tensor]:
        made = getattr(transformers, kind + ending)(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
                                                       **config})
        made._attn_implementation = "sdpa" if kind == "Falcon" else "eager"    # eager adds Falcon's ALiBi twice
        model = getattr(transformers, heads.get(kind, kind + "ForCausalLM"))(made)
        if change:
            change(model)
        found = model.load_state_dict(undo({n: t.clone() for n, t in state.items()}), strict=False)
        tied = {"lm_head.weight"} if made.tie_word_embeddings else set()
        assert not found.unexpected_keys and set(found.missing_keys) <= tied, found
        model.tie_weights()
        model.eval()
        return lambda ids: model(torch.tensor([ids])).logits[0]
    return build


def shapes_of(kind: str, config: dict, rename: Callable[[str], str] = lambda name: name) -> dict:
    """Of transformers' own tensors, under other names; a tied head is not in the files."""
    import transformers
    made = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))(**config)
    heads = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}
    model = getattr(transformers, heads.get(kind, kind + "ForCausalLM"))(made)
    return {rename(name): tuple(t.shape) for name, t in model.state_dict().items()
            if not (name == "lm_head.weight" and made.tie_word_embeddings)}


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    """Replaces, in order, in every name."""
    def undo(state: State) -> State:
        out = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new)
            out[name] = tensor
        return out
    return undo


def layers(prefix: str, inside: dict, n: int = L, **outside) -> dict:
    """Shapes: `prefix` with the number of the layer in front of what is inside, __ for a dot outside."""
    return ({prefix.format(i) + name: shape for i in range(n) for name, shape in inside.items()}
            | {name.replace("__", "."): shape for name, shape in outside.items()})


def biased(shapes: dict, *names: str) -> dict:
    """With a bias beside each weight whose name ends like one of these."""
    return shapes | {n.removesuffix("weight") + "bias": s[:1] for n, s in shapes.items()
                     if n.removesuffix(".weight").endswith(names)}


LLAMA = {"vocab_size": V, "hidden_size": C, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": H,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
LLAMA_SHAPES = layers("model.layers.{}.", {
    "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,), "self_attn.q_proj.weight": (C, C),
    "self_attn.k_proj.weight": (C, C), "self_attn.v_proj.weight": (C, C), "self_attn.o_proj.weight": (C, C),
    "mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C), "mlp.down_proj.weight": (C, I)},
    model__embed_tokens__weight=(V, C), model__norm__weight=(C,), lm_head__weight=(V, C))
CASES: dict[str, Case] = {}


def split(state: State, fused: str, parts: dict[str, list[int]]) -> None:
    """Cuts every tensor whose name has `fused` in it: parts = new name: rows."""
    for name in [n for n in state if fused in n]:
        tensor = state.pop(name)
        for new, rows in parts.items():
            state[name.replace(fused, new)] = tensor[rows]


def rows(*cuts: int) -> list[list[int]]:
    """The numbers of the rows of parts that stand one after the other."""
    ends = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    return [list(range(a, b)) for a, b in zip(ends, ends[1:])]


# ---------------------------------------------------------------- Baichuan

PACKED = {n: s for n, s in LLAMA_SHAPES.items() if not any(f"{x}_proj" in n and "self_attn" in n for x in "qkv")} | {
    f"model.layers.{i}.self_attn.W_pack.weight": (3 * C, C) for i in range(L)}
QKV = [f"self_attn.{x}_proj" for x in "qkv"]


def unpacked(state: State) -> State:
    split(state, "self_attn.W_pack", dict(zip(QKV, rows(C, C, C))))
    return state


def normalised(state: State) -> State:
    head = state["lm_head.weight"]
    state["lm_head.weight"] = head / head.norm(dim=1, keepdim=True)
    return unpacked(state)


BAICHUAN = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], **LLAMA}
B13 = {k: v for k, v in BAICHUAN.items() if k != "max_position_embeddings"} | {"model_max_length": 64,
                                                                               "num_attention_heads": 6}
CASES["baichuan 7b"] = Case(BAICHUAN, PACKED, twin("Llama", LLAMA, unpacked), form="bin", junk={
    f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(L)})
CASES["baichuan 13b"] = Case(B13, PACKED, lambda state: lambda ids: reference.baichuan_13b(state, B13, ids))
CASES["baichuan2 7b"] = Case(BAICHUAN | {"z_loss_weight": 0}, PACKED, twin("Llama", LLAMA, normalised), back="llama")
CASES["baichuan2 13b"] = Case(B13 | {"z_loss_weight": 0}, PACKED, lambda state: lambda ids: reference.baichuan_13b(
    state, B13, ids, normalised=True), back="chatpixiu")

# ---------------------------------------------------------------- InternLM

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
INTERNLM = {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], **LLAMA, "bias": True}
WITH_BIAS = biased(LLAMA_SHAPES, *QKV, "self_attn.o_proj")
CASES["internlm"] = Case(INTERNLM, WITH_BIAS, twin("Llama", LLAMA | {"attention_bias": True}, lambda s: s),
                         form="fp16 shards")
CASES["internlm rotary"] = Case(
    INTERNLM | {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 2.0}, "max_position_embeddings": 16},
    WITH_BIAS, twin("Llama", LLAMA | {"attention_bias": True, "max_position_embeddings": 16, "rope_parameters":
                                      DYNAMIC}, lambda s: s), generate=False)


def internlm2_undone(state: State) -> State:
    """wqkv: the two queries of a key head, then its key and its value."""
    group = [list(range(g * 4 * D, (g + 1) * 4 * D)) for g in range(K)]
    split(state, "attention.wqkv", {"self_attn.q_proj": [r for g in group for r in g[:2 * D]],
                                    "self_attn.k_proj": [r for g in group for r in g[2 * D:3 * D]],
                                    "self_attn.v_proj": [r for g in group for r in g[3 * D:]]})
    return renamed(("tok_embeddings", "embed_tokens"), ("output.", "lm_head."), ("attention_norm", "input_layernorm"),
                   ("ffn_norm", "post_attention_layernorm"), ("attention.wo", "self_attn.o_proj"),
                   ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"),
                   ("feed_forward.w3", "mlp.up_proj"))(state)


CASES["internlm2"] = Case(
    {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], **LLAMA, "num_key_value_heads": K,
     "bias": False, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    layers("model.layers.{}.", {
        "attention_norm.weight": (C,), "ffn_norm.weight": (C,), "attention.wqkv.weight": (C + 2 * K * D, C),
        "attention.wo.weight": (C, C), "feed_forward.w1.weight": (I, C), "feed_forward.w3.weight": (I, C),
        "feed_forward.w2.weight": (C, I)}, model__tok_embeddings__weight=(V, C), model__norm__weight=(C,),
        output__weight=(V, C)),
    twin("Llama", LLAMA | {"num_key_value_heads": K, "rope_parameters": DYNAMIC | {"rope_theta": 1e6}},
         internlm2_undone))

# ---------------------------------------------------------------- ChatGLM2, ChatGLM3, CodeGeeX2, GLM-4

GLM2 = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "ffn_hidden_size": I, "hidden_size": C, "kv_channels": D, "num_layers": L,
        "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": K, "rmsnorm": True,
        "num_attention_heads": H, "original_rope": True, "padded_vocab_size": V, "post_layer_norm": True,
        "seq_length": 64, "tie_word_embeddings": False, "torch_dtype": "float16"}
GLM = {"vocab_size": V, "hidden_size": C, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": H,
       "num_key_value_heads": K, "head_dim": D, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
       "tie_word_embeddings": False, "attention_bias": True}


def glm2_shapes(kv: int) -> dict:
    fused = (H + 2 * kv) * D
    return layers("transformer.encoder.layers.{}.", {
        "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
        "self_attention.query_key_value.weight": (fused, C), "self_attention.query_key_value.bias": (fused,),
        "self_attention.dense.weight": (C, C), "mlp.dense_h_to_4h.weight": (2 * I, C),
        "mlp.dense_4h_to_h.weight": (C, I)}, transformer__embedding__word_embeddings__weight=(V, C),
        transformer__encoder__final_layernorm__weight=(C,), transformer__output_layer__weight=(V, C))


def glm2_undone(kv: int, multi_query: bool = True) -> Callable[[State], State]:
    """With multi-query attention q, k, v stand one after the other, however many key heads there are; else by head."""
    def undo(state: State) -> State:
        each = [list(range(h * 3 * D, (h + 1) * 3 * D)) for h in range(H)]
        cuts = rows(C, kv * D, kv * D) if multi_query else [[r for h in each for r in h[i * D:(i + 1) * D]]
                                                            for i in range(3)]
        split(state, "self_attention.query_key_value", dict(zip(QKV, cuts)))
        return renamed(
            ("transformer.encoder.final_layernorm", "model.norm"), ("transformer.output_layer", "lm_head"),
            ("transformer.encoder.", "model."), ("transformer.embedding.word_embeddings", "model.embed_tokens"),
            ("self_attention.dense", "self_attn.o_proj"), ("dense_h_to_4h", "gate_up_proj"),
            ("dense_4h_to_h", "down_proj"))(state)
    return undo


def all_biases(model) -> None:
    for name, linear in model.named_modules():
        if name.endswith(("o_proj", "gate_up_proj", "down_proj")):
            linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))


def rope_of(theta: float, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5, **more}}


INV_FREQ = {"transformer.rotary_pos_emb.inv_freq": torch.ones(3)}
CASES["chatglm2"] = Case(GLM2, glm2_shapes(K), twin("Glm", GLM | rope_of(1e4), glm2_undone(K)), junk=INV_FREQ,
                         form="fp16 shards")
CASES["chatglm2 32k"] = Case(
    GLM2 | {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"}, glm2_shapes(K),
    twin("Glm", GLM | rope_of(1e4, rope_type="linear", factor=4.0), glm2_undone(K)), junk=INV_FREQ)
CASES["chatglm3 32k"] = Case(GLM2 | {"rope_ratio": 50}, glm2_shapes(K), twin("Glm", GLM | rope_of(5e5), glm2_undone(K)))
CASES["chatglm2 all heads"] = Case(GLM2 | {"multi_query_attention": False}, glm2_shapes(H), twin(
    "Glm", GLM | {"num_key_value_heads": H} | rope_of(1e4), glm2_undone(H, multi_query=False)))
CASES["chatglm2 a group for each head"] = Case(GLM2 | {"multi_query_group_num": H}, glm2_shapes(H), twin(
    "Glm", GLM | {"num_key_value_heads": H} | rope_of(1e4), glm2_undone(H)))
CASES["chatglm2 all biases"] = Case(
    GLM2 | {"add_bias_linear": True}, biased(glm2_shapes(K), "dense", "dense_h_to_4h", "dense_4h_to_h"),
    twin("Glm", GLM | rope_of(1e4), glm2_undone(K), change=all_biases))
CASES["codegeex2"] = Case(GLM2 | {"rope_ratio": 1, "interleaved_qkv": False, "rotary_percent": 0.5}, glm2_shapes(K),
                          twin("Glm", GLM | rope_of(1e4), glm2_undone(K)), junk=INV_FREQ)
CASES["glm-4 9b"] = Case(
    GLM2 | {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07, "vocab_size": V}, glm2_shapes(K),
    twin("Glm", GLM | {"rms_norm_eps": 1.5625e-7} | rope_of(5e6), glm2_undone(K)), junk=INV_FREQ)

# ---------------------------------------------------------------- ChatGLM-6B, GLM-10B

SOP, GMASK, MASK, SMASK = 8, 7, 6, 5
BLOCK = {"input_layernorm.weight": (C,), "input_layernorm.bias": (C,), "post_attention_layernorm.weight": (C,),
         "post_attention_layernorm.bias": (C,), "attention.query_key_value.weight": (3 * C, C),
         "attention.query_key_value.bias": (3 * C,), "attention.dense.weight": (C, C), "attention.dense.bias": (C,),
         "mlp.dense_h_to_4h.weight": (4 * C, C), "mlp.dense_h_to_4h.bias": (4 * C,),
         "mlp.dense_4h_to_h.weight": (C, 4 * C), "mlp.dense_4h_to_h.bias": (C,)}
CHATGLM = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "bos_token_id": SOP, "eos_token_id": 9,
           "gmask_token_id": GMASK, "mask_token_id": MASK, "hidden_size": C, "inner_hidden_size": 4 * C, "vocab_size":
           V, "layernorm_epsilon": 1e-5, "max_sequence_length": 64, "num_attention_heads": H, "num_layers": L,
           "pad_token_id": 3, "position_encoding_2d": True, "torch_dtype": "float16"}
CASES["chatglm-6b"] = Case(
    CHATGLM, layers("transformer.layers.{}.", BLOCK, transformer__word_embeddings__weight=(V, C),
                    transformer__final_layernorm__weight=(C,), transformer__final_layernorm__bias=(C,),
                    lm_head__weight=(V, C)),
    lambda state: lambda ids: reference.chatglm_6b(state, CHATGLM, ids), form="fp16 shards",
    texts=[words(250, 1) + [GMASK, SOP] + words(8, 2),         # so long that the rounding of the frequencies shows
           words(9, 3) + [MASK] + words(9, 4) + [GMASK, SOP] + words(19, 5)],
    prompts=[words(9, 6) + [GMASK, SOP], words(2, 7) + [MASK] + words(5, 8) + [SOP], words(3, 9) + [GMASK, SOP]],
    junk={f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(3) for i in range(L)})
GLM10 = {"model_type": "glm", "architectures": ["GLMModel"], "attention_scale": 1.0, "block_position_encoding": True,
         "hidden_size": C, "max_sequence_length": 64, "num_attention_heads": H, "num_layers": L, "output_predict": True,
         "relative_encoding": False, "torch_dtype": "float16", "vocab_size": V, "smask_token_id": SMASK}
CASES["glm-10b"] = Case(
    GLM10, layers("glm.transformer.layers.{}.", BLOCK, glm__word_embeddings__weight=(V, C),
                  glm__transformer__position_embeddings__weight=(65, C), glm__transformer__final_layernorm__bias=(C,),
                  glm__transformer__block_position_embeddings__weight=(65, C),
                  glm__transformer__final_layernorm__weight=(C,)),
    lambda state: lambda ids: reference.glm_10b(state, GLM10, ids, SOP, [MASK, SMASK, GMASK]), form="bin",
    texts=[words(14, 1) + [MASK] + words(9, 2) + [SOP] + words(15, 3),
           words(5, 4) + [SMASK] + words(4, 5) + [MASK] + words(3, 6) + [GMASK, SOP] + words(24, 7)],
    prompts=[words(9, 6) + [MASK] + words(4, 5) + [SOP], words(5, 8) + [GMASK, SOP], [SMASK] + words(3, 9) + [SOP]])

# ---------------------------------------------------------------- PanGu-alpha, CodeGeeX-13B

PANGU_RAW = {"model_type": "gpt_pangu", "activation_function": "gelu", "hidden_size": C, "max_position_embeddings": 64,
             "num_heads": H, "num_layers": L, "vocab_size": V}
PANGU_SHAPES = biased(layers("transformer.h.{}.", {
    "ln_1.weight": (C,), "ln_2.weight": (C,), "attn.q_proj.weight": (C, C), "attn.k_proj.weight": (C, C),
    "attn.v_proj.weight": (C, C), "attn.c_proj.weight": (C, C), "mlp.c_fc.weight": (4 * C, C),
    "mlp.c_proj.weight": (C, 4 * C)}, transformer__wte__weight=(V, C), transformer__wpe__weight=(64, C),
    transformer__wqe__weight=(64, C), transformer__ln_f__weight=(C,)), "ln_1", "ln_2", "_proj", "c_fc", "ln_f")


def pangu(norm_first: bool):
    return lambda state: lambda ids: reference.top_query(state, reference.PANGU, L, H, ids, reference.gelu_tanh,
                                                         norm_first, "transformer.")


CASES["pangu"] = Case(PANGU_RAW, PANGU_SHAPES, pangu(False), form="bin")
CASES["pangu port"] = Case(PANGU_RAW | {"architectures": ["GPTPanguForCausalLM"]}, PANGU_SHAPES, pangu(True), junk={
    f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(L) for name in ("bias", "masked_bias")})
GEEX = {"attention.query.weight": (C, C), "attention.key.weight": (C, C), "attention.value.weight": (C, C)} | {
    n: s for n, s in BLOCK.items() if n.endswith("weight") and "query_key_value" not in n}
CASES["codegeex"] = Case(
    {"model_type": "codegeex", "hidden_size": C, "num_layers": L, "num_attention_heads": H, "vocab_size": V,
     "max_position_embeddings": 64},
    biased(layers("language_model.transformer.layers.{}.", GEEX) | layers(
        "language_model.transformer.topQueryLayer.", GEEX, 1,
        language_model__embedding__word_embeddings__weight=(V, C),
        language_model__embedding__position_embeddings__weight=(64, C),
        language_model__topQueryEmbedding__top_query_embeddings__weight=(64, C),
        language_model__transformer__final_layernorm__weight=(C,)),
        "layernorm", "query", "key", "value", "dense", "_4h", "_to_h"),
    lambda state: lambda ids: reference.top_query(state, reference.CODEGEEX, L + 1, H, ids, reference.gelu_fast, True,
                                                  "language_model."), form="nested")
CASES["codegeex counted"] = replace(CASES["codegeex"], raw=CASES["codegeex"].raw | {"num_layers": L + 1}, form="bin")

# ---------------------------------------------------------------- GPT-2's relatives in the names of their day

GPT2 = {"vocab_size": V, "n_embd": C, "n_layer": L, "n_head": H, "n_positions": 64}


def same(kind: str, config: dict, raw: dict, rename=lambda name: name, undo=lambda state: state, **more) -> Case:
    """transformers' own tensors under other names."""
    return Case(raw, shapes_of(kind, config, rename), twin(kind, config, undo), **more)


def masks(where: str, **kinds: Tensor) -> State:
    return {f"{where.format(i)}{name}": tensor.clone() for i in range(L) for name, tensor in kinds.items()}


def prefixed(prefix: str, *outside: str) -> tuple[Callable, Callable]:
    """(file name <- transformers' name, tensors back): the file lacks transformers' prefix."""
    def undo(state: State) -> State:
        return {n if n.startswith(outside) else prefix + n: t for n, t in state.items()}
    return lambda name: name.removeprefix(prefix), undo


TRIANGLE, TINY = torch.ones(1, 1, 64, 64).tril().bool(), torch.tensor(-1e9)
CASES["gpt2 bare"] = same("GPT2", GPT2, {"model_type": "gpt2", **GPT2}, *prefixed("transformer.", "lm_head"),
                          junk=masks("h.{}.attn.", bias=TRIANGLE.float()), form="bin")
CASES["openai-gpt"] = same("OpenAIGPT", GPT2 | {"afn": "gelu"}, {"model_type": "openai-gpt", "afn": "gelu", **GPT2},
                           junk=masks("transformer.h.{}.attn.", bias=TRIANGLE.float()))
CASES["openai-gpt bare"] = same("OpenAIGPT", GPT2, {"model_type": "openai-gpt", "afn": "gelu", **GPT2},
                                *prefixed("transformer.", "lm_head"), form="bin")
CASES["gptj"] = same("GPTJ", GPT2 | {"rotary_dim": 8}, {"model_type": "gptj", "rotary_dim": 8, **GPT2}, junk=masks(
    "transformer.h.{}.attn.", bias=TRIANGLE, masked_bias=TINY), form="bin")
CASES["moss"] = same("CodeGen", GPT2 | {"rotary_dim": 8}, {
    "model_type": "moss", "architectures": ["MossForCausalLM"], "activation_function": "gelu_new", "n_ctx": 64,
    "n_inner": None, "layer_norm_epsilon": 1e-5, "rotary_dim": 8, "tie_word_embeddings": False, **GPT2},
    junk=masks("transformer.h.{}.attn.", causal_mask=TRIANGLE), form="fp16 shards")
CASES["codegen"] = same("CodeGen", GPT2 | {"rotary_dim": 4}, {"model_type": "codegen", "rotary_dim": 4, **GPT2},
                        junk=masks("transformer.h.{}.attn.", causal_mask=TRIANGLE), form="bin")
SANTA = {n: s for n, s in shapes_of("GPT2", GPT2).items() if "c_attn" not in n} | layers("transformer.h.{}.attn.", {
    "q_attn.weight": (C, C), "q_attn.bias": (C,), "kv_attn.weight": (C, 2 * D), "kv_attn.bias": (2 * D,)})


def santa_undone(state: State) -> State:
    """Conv1D, and the key and value that all heads share in a tensor of their own; bigcode: one nn.Linear."""
    for i in range(L):
        at = f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            q, kv = (state.pop(f"{at}attn.{n}_attn.{kind}") for n in ("q", "kv"))
            state[f"{at}attn.c_attn.{kind}"] = torch.cat((q.T, kv.T)) if kind == "weight" else torch.cat((q, kv))
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            state[f"{at}{name}.weight"] = state[f"{at}{name}.weight"].T.contiguous()
    return state


CASES["santacoder"] = Case({
    "model_type": "gpt2", "architectures": ["GPT2LMHeadCustomModel"], "activation_function": "gelu_fast",
    "attention_head_type": "multiquery", **GPT2}, SANTA, twin("GPTBigCode", GPT2, santa_undone),
    junk=masks("transformer.h.{}.attn.", bias=TRIANGLE))
OPT = {"vocab_size": V, "hidden_size": C, "ffn_dim": 100, "num_hidden_layers": L, "num_attention_heads": H,
       "max_position_embeddings": 64, "word_embed_proj_dim": C}
for prefix in ("decoder.", "model.decoder.", ""):
    CASES[f"opt {prefix}"] = same(
        "OPT", OPT, {"model_type": "opt", **OPT}, lambda name, p=prefix: name.replace("model.decoder.", p),
        lambda state, p=prefix: {"model.decoder." + n.removeprefix(p): t for n, t in state.items()}, form="bin")
BLOOM = {"vocab_size": V, "hidden_size": C, "n_layer": L, "n_head": 6}
CASES["bloom bare"] = same("Bloom", BLOOM, {
    "model_type": "bloom", "vocab_size": V, "n_embed": C, "n_layer": L, "num_attention_heads": 6, "seq_length": 64,
    "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False, "bias_dropout_fusion": True,
    "masked_softmax_fusion": True, "unk_token_id": 0}, *prefixed("transformer.", "lm_head"), form="fp16 shards")
NEOX = {"vocab_size": V, "hidden_size": C, "intermediate_size": 100, "num_hidden_layers": L, "num_attention_heads": H,
        "max_position_embeddings": 64, "rotary_pct": 0.34}
CASES["gpt_neox"] = same(
    "GPTNeoX", NEOX, {"model_type": "gpt_neox", "rotary_emb_base": 10000, **NEOX}, lambda name: name.replace(
        "lm_head", "embed_out"), renamed(("embed_out", "lm_head")), form="bin", junk=masks(
        "gpt_neox.layers.{}.attention.", bias=TRIANGLE, masked_bias=TINY, **{"rotary_emb.inv_freq": torch.ones(2)}))
FALCON = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H}
RW = {"vocab_size": V, "hidden_size": C, "n_layer": L, "n_head": H, "layer_norm_epsilon": 1e-5, "bias": False,
      "alibi": False, "parallel_attn": True, "apply_residual_connection_post_layernorm": False}
CASES["falcon 7b"] = same("Falcon", FALCON, {"model_type": "RefinedWebModel", "multi_query": True, **RW}, form="bin")
CASES["falcon 40b"] = same("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": K},
                           {"model_type": "RefinedWeb", "n_head_kv": K, **RW})
CASES["falcon rw"] = same(
    "Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    {"model_type": "RefinedWeb", **RW, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True})

# ---------------------------------------------------------------- LLaMA's relatives

STABLE = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {"num_key_value_heads": K}
CASES["stablelm epoch"] = same(
    "StableLm", STABLE | {"partial_rotary_factor": 0.5, "rope_theta": 2e4}, {
        "model_type": "stablelm_epoch", **STABLE, "norm_eps": 1e-5, "rope_pct": 0.5, "rope_theta": 20000,
        "rotary_scaling_factor": 1.0, "use_qkv_bias": False})
YI = LLAMA | {"num_key_value_heads": K}
CASES["yi"] = same("Llama", YI, {"model_type": "Yi", "rope_theta": 10000.0, **YI}, lambda name: name.replace(
    "input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"), renamed(
        ("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")), form="bin")
CASES["yi renamed"] = same("Llama", YI, {"model_type": "Yi", "rope_theta": 10000.0, **YI})
for name in ("xverse", "aquila", "skywork"):
    CASES[name] = same("Llama", YI, {"model_type": name, **YI}, form="bin")
CASES["qwen2 fp16"] = same("Qwen2", YI, {"model_type": "qwen2", **YI, "use_sliding_window": False, "sliding_window": 8,
                                         "max_window_layers": 1}, form="fp16 shards", back="qwen2")
GEMMA3 = {"vocab_size": V, "hidden_size": C, "intermediate_size": I, "num_hidden_layers": 7, "num_attention_heads": H,
          "num_key_value_heads": K, "head_dim": 20, "sliding_window": 6, "query_pre_attn_scalar": 20}
CASES["gemma3 with eyes"] = same(
    "Gemma3", GEMMA3 | {"max_position_embeddings": 64}, {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
        "text_config": {"model_type": "gemma3_text", **GEMMA3}, "vision_config": {"hidden_size": 9}},
    lambda name: "language_model." + name, renamed(("language_model.", "")), junk={
        "vision_tower.vision_model.embeddings.patch_embedding.weight": torch.ones(3, 3),
        "multi_modal_projector.mm_input_projection_weight": torch.ones(3, 3)})
CASES["gemma3 with eyes, later"] = same(
    "Gemma3", GEMMA3 | {"max_position_embeddings": 64}, CASES["gemma3 with eyes"].raw, lambda name: name.replace(
        "model.", "model.language_model."), renamed(("model.language_model.", "model.")), form="bin", junk={
        "model.vision_tower.vision_model.head.weight": torch.ones(3, 3),
        "model.multi_modal_projector.mm_input_projection_weight": torch.ones(3, 3)})

# ---------------------------------------------------------------- Qwen 1, Granite, MiniCPM, Cohere, OLMo, Phi


def qwen_undone(state: State) -> State:
    split(state, "attn.c_attn", dict(zip(QKV, rows(C, C, C))))
    return renamed(("transformer.h.", "model.layers."), ("attn.c_proj", "self_attn.o_proj"), ("mlp.w1", "mlp.up_proj"),
                   ("mlp.w2", "mlp.gate_proj"), ("mlp.c_proj", "mlp.down_proj"), ("ln_1", "input_layernorm"),
                   ("ln_2", "post_attention_layernorm"), ("transformer.wte", "model.embed_tokens"),
                   ("transformer.ln_f", "model.norm"))(state)


CASES["qwen 1"] = Case(
    {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": V, "hidden_size": C, "num_hidden_layers":
     L, "num_attention_heads": H, "intermediate_size": 2 * I, "kv_channels": D, "layer_norm_epsilon": 1e-6,
     "max_position_embeddings": 128, "no_bias": True, "rotary_emb_base": 20000, "rotary_pct": 1.0, "seq_length": 64,
     "scale_attn_weights": True, "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True},
    biased(layers("transformer.h.{}.", {
        "ln_1.weight": (C,), "ln_2.weight": (C,), "attn.c_attn.weight": (3 * C, C), "attn.c_proj.weight": (C, C),
        "mlp.w1.weight": (I, C), "mlp.w2.weight": (I, C), "mlp.c_proj.weight": (C, I)},
        transformer__wte__weight=(V, C), transformer__ln_f__weight=(C,), lm_head__weight=(V, C)), "c_attn"),
    twin("Qwen2", LLAMA | {"rope_theta": 2e4, "num_key_value_heads": H}, qwen_undone))
TIMES = {"embedding_multiplier": 6.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22, "logits_scaling": 8.0}
CASES["granite"] = same("Granite", YI | TIMES, {"model_type": "granite", **YI, **TIMES})
CASES["granite tied"] = same("Granite", YI | TIMES | {"tie_word_embeddings": True, "attention_bias": True}, {
    "model_type": "granite", **YI, **TIMES, "tie_word_embeddings": True, "attention_bias": True})


def minicpm_undone(state: State) -> State:
    """transformers has no such model: as a LLaMA whose weights carry the constants."""
    state["model.embed_tokens.weight"] = 12 * state["model.embed_tokens.weight"]
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = state[name] * 1.4 / L ** 0.5
    state["lm_head.weight"] = state["model.embed_tokens.weight"] / 12 / (C / 16)
    return state


MINICPM = {**YI, "tie_word_embeddings": False}
CASES["minicpm"] = Case(
    {"model_type": "minicpm", **{k: v for k, v in YI.items() if k != "tie_word_embeddings"}, "scale_emb": 12,
     "dim_model_base": 16, "scale_depth": 1.4}, shapes_of("Llama", YI | {"tie_word_embeddings": True}),
    twin("Llama", MINICPM, minicpm_undone))
COHERE = {k: v for k, v in YI.items() if k not in ("rms_norm_eps", "tie_word_embeddings")} | {
    "layer_norm_eps": 1e-5, "rope_theta": 20000.0}
CASES["cohere"] = same("Cohere", COHERE | {"logit_scale": 0.25}, {
    "model_type": "cohere", **COHERE, "logit_scale": 0.25, "use_qk_norm": False})
CASES["cohere2"] = same("Cohere2", COHERE | {"sliding_window": 6, "num_hidden_layers": 5}, {
    "model_type": "cohere2", **COHERE, "sliding_window": 6, "num_hidden_layers": 5, "sliding_window_pattern": 4})
OLMO3 = YI | {"num_hidden_layers": 5, "sliding_window": 6, "rms_norm_eps": 1e-6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.1}
CASES["olmo3"] = same("Olmo3", OLMO3, {"model_type": "olmo3", **OLMO3})
CASES["olmo3 long"] = same("Olmo3", OLMO3 | {"rope_scaling": YARN, "rope_theta": 5e5}, {
    "model_type": "olmo3", **OLMO3, "rope_scaling": YARN, "rope_theta": 500000})
OLMO = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}


def olmo_undone(state: State) -> State:
    split(state, "att_proj", dict(zip(QKV, rows(C, C, C))))
    split(state, "ff_proj", dict(zip(("mlp.up_proj", "mlp.gate_proj"), rows(I, I))))
    return renamed(("transformer.blocks.", "layers."), ("attn_out", "self_attn.o_proj"),
                   ("model.transformer.ff_out", "lm_head"), ("ff_out", "mlp.down_proj"),
                   ("transformer.wte", "embed_tokens"))(state)


CASES["olmo's first"] = Case(
    {"model_type": "hf_olmo", "d_model": C, "n_heads": H, "n_layers": L, "mlp_ratio": 4, "mlp_hidden_size": 2 * I,
     "max_sequence_length": 64, "vocab_size": V - 4, "embedding_size": V, "weight_tying": False, "clip_qkv": 0.8,
     "activation_type": "swiglu", "rope": True, "alibi": False, "include_bias": False, "layer_norm_type": "default",
     "layer_norm_with_affine": False, "multi_query_attention": False},
    layers("model.transformer.blocks.{}.", {"att_proj.weight": (3 * C, C), "attn_out.weight": (C, C), "ff_proj.weight":
                                            (2 * I, C), "ff_out.weight": (C, I)},
           model__transformer__wte__weight=(V, C), model__transformer__ff_out__weight=(V, C)),
    twin("Olmo", OLMO | {"clip_qkv": 0.8}, olmo_undone))
PHI = {"vocab_size": V, "hidden_size": C, "intermediate_size": 4 * C, "num_hidden_layers": L, "num_attention_heads": H,
       "max_position_embeddings": 64, "partial_rotary_factor": 0.5}


def phi_undone(state: State) -> State:
    split(state, "mixer.Wqkv", dict(zip(QKV, rows(C, C, C))))
    return renamed(("transformer.h.", "model.layers."), (".ln.", ".input_layernorm."), ("lm_head.input_layernorm",
                   "model.final_layernorm"), ("lm_head.linear", "lm_head"), ("mixer.out_proj", "self_attn.dense"),
                   ("transformer.embd.wte", "model.embed_tokens"))(state)


CASES["phi's first"] = Case(
    {"model_type": "phi-msft", "architectures": ["PhiForCausalLM"], "vocab_size": V, "n_embd": C, "n_head": H,
     "n_layer": L, "n_positions": 64, "n_inner": None, "n_head_kv": None, "rotary_dim": 6, "activation_function":
     "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    biased(layers("transformer.h.{}.", {
        "ln.weight": (C,), "mixer.Wqkv.weight": (3 * C, C), "mixer.out_proj.weight": (C, C), "mlp.fc1.weight":
        (4 * C, C), "mlp.fc2.weight": (C, 4 * C)}, transformer__embd__wte__weight=(V, C), lm_head__ln__weight=(C,),
        lm_head__linear__weight=(V, C)), "ln", "Wqkv", "out_proj", "fc1", "fc2", "linear"),
    twin("Phi", PHI, phi_undone))
