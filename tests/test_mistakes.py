"""Would the parity tests see it? Each mistake that has been made in such a loader, or that is one line away, is made on
purpose in ours; then the error against the reference must exceed ten times what those tests allow. The right code is
measured on the same texts, so that a reference that is itself wrong cannot pass for a mistake that was found.

A mistake is a change of the config, of the family's entry in the table, of the loaded model, or of one function.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import remote_cases
import test_families
import test_families_remote
import torch
from conftest import error, random_ids
from torch import Tensor, nn

import checkpoints
import model as model_file
from checkpoints import families, layouts
from model import Transformer

TOLERANCE = max(test_families.TOLERANCE, test_families_remote.TOLERANCE)
PATCH = pytest.MonkeyPatch


@dataclass
class Mistake:
    case: str                                          # in test_families.MODELS or in remote_cases.CASES
    config: dict | Callable | None = None              # what our config says instead: fields, or config -> config
    family: dict | Callable | None = None              # what the table says instead: fields, or family -> family
    model: Callable[[Transformer], None] | None = None         # done to the loaded model
    code: Callable[[PATCH], None] | None = None        # functions exchanged


# ---------------------------------------------------------------- functions that are wrong

def naive_slopes(heads: int, steepest: float = 8.0) -> Tensor:
    """The formula for powers of two, whatever the number of heads."""
    return torch.tensor([2 ** (-steepest * (i + 1) / heads) for i in range(heads)])


def positions_with_pads(docs: Tensor) -> Tensor:
    return torch.arange(docs.shape[1]).expand_as(docs)


def without_context(right):
    def wrong(config, docs, queries, positions, dtype, context=None, window=None):
        return right(config, docs, queries, positions, dtype, None, window)
    return wrong


def holes_at(choose: Callable) -> Callable:
    """The layout of GLM with other positions: choose(positions, blocks, ids) -> positions, blocks."""
    def change(patch: PATCH) -> None:
        right = model_file.prefix_layout

        def wrong(ids, docs, positions, prefix_ids, earliest=False):
            stuck, blocks, context = right(ids, docs, positions, prefix_ids, earliest)
            return *choose(positions, stuck, blocks), context
        patch.setattr(model_file, "prefix_layout", wrong)
    return change


def key_heads_in_turn(patch: PATCH) -> None:
    """Query head h asks key head h mod K instead of h // G."""
    right = model_file.attend

    def wrong(q, k, v, bias, *rest):
        G = q.shape[1] // k.shape[1]
        return right(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), bias, *rest)
    patch.setattr(model_file, "attend", wrong)


def turned_the_other_way(patch: PATCH) -> None:
    right = model_file.rope_tables

    def wrong(*args, **kwargs):
        cos, sin = right(*args, **kwargs)
        return cos, -sin
    patch.setattr(model_file, "rope_tables", wrong)


def bias_lost(name: str) -> Callable[[Transformer], None]:
    def change(model: Transformer) -> None:
        model.layers[1].get_submodule(name).bias.zero_()
    return change


def norms_of_each_head(model: Transformer) -> None:
    for layer in model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            def wrong(x, norm=norm, D=layer.self_attn.head_dim):
                heads = x.unflatten(-1, (-1, D))
                scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
                return (heads * scale).flatten(-2) * norm.weight
            norm.forward = wrong


def norms_exchanged(model: Transformer) -> None:
    for layer in model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def biases_of_norms_lost(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias.zero_()


def head_kept_tied(patch: PATCH) -> None:
    """The config says tied, the file has a head of its own, and the config is believed."""
    patch.setattr(checkpoints, "settle_head", lambda files, config, family: files.pop("lm_head.weight"))


def first_rows_kept(files, config, raw) -> None:
    """OPT: the last two rows are dropped instead of the first."""
    table = files["embed_positions.weight"]
    files["embed_positions.weight"] = layouts.derived((64, 48), lambda: table.read()[:-2], table)


def swap(key: str, new: str) -> Callable:
    return lambda family: replace(family, names=family.names | {key: new})


GATE_UP = "layers.*.mlp.gate_proj layers.*.mlp.up_proj"
UP_GATE = "layers.*.mlp.up_proj layers.*.mlp.gate_proj"
SOP_AS_HOLE = holes_at(lambda count, stuck, blocks: (count, blocks))
BLOCKS_FROM_ZERO = holes_at(lambda count, stuck, blocks: (stuck, (blocks - 1).clamp(min=0)))

MISTAKES = {
    # activations and biases
    "gelu for its tanh formula": Mistake("gpt2", {"activation": "gelu"}),
    "tanh formula for gelu": Mistake("starcoder", {"activation": "gelu"}),
    "sigmoid formula for gelu": Mistake("codegeex", {"activation": "gelu"}),
    "relu for relu squared": Mistake("nanochat", {"activation": "relu"}),
    "gate and up exchanged": Mistake("chatglm2", family=swap("encoder.layers.*.mlp.dense_h_to_4h", UP_GATE)),
    "gate and up exchanged (w1, w2)": Mistake("qwen 1", family=lambda f: replace(f, names=f.names | {
        "h.*.mlp.w1": "layers.*.mlp.gate_proj", "h.*.mlp.w2": "layers.*.mlp.up_proj"})),
    "the bias of v lost": Mistake("qwen2", model=bias_lost("self_attn.v_proj")),
    "the bias of o lost": Mistake("internlm", model=bias_lost("self_attn.o_proj")),
    "the bias of the MLP lost": Mistake("chatglm2 all biases", model=bias_lost("mlp.down_proj")),
    "the bias of the head lost": Mistake("gptj", model=lambda m: m.lm_head.bias.zero_()),
    "the biases of LayerNorms lost": Mistake("stablelm 3b", model=biases_of_norms_lost),
    # layouts
    "q, k, v in a row instead of head by head": Mistake("gpt_neox", family={"qkv": "concat"}),
    "q, k, v head by head instead of in a row": Mistake("baichuan 7b", family={"qkv": "per head"}),
    "q, k, v in a row instead of group by group": Mistake("internlm2", family={"qkv": "concat"}),
    "q, k, v of all heads in a row (ChatGLM2)": Mistake("chatglm2 all heads", family={"qkv": "concat"}),
    "CodeGen's four parts taken for one": Mistake("moss", family={"qkv": "concat"}),
    "a square Conv1D not transposed": Mistake("gpt2", family={"transposed": r"c_attn|c_fc|mlp\.c_proj"}),
    "pairs of RoPE taken for halves": Mistake("gptj", family={"rope": "halves"}),
    "pairs of RoPE taken for halves (GLM)": Mistake("glm-4 9b", family={"rope": "halves"}),
    "halves of RoPE taken for pairs": Mistake("qwen3", family={"rope": "pairs"}),
    "RoPE the other way round": Mistake("nanochat", family={"rope": "halves"}),
    "RoPE the other way round (sin)": Mistake("chatglm-6b", code=turned_the_other_way),
    "2-D RoPE over the whole head": Mistake("chatglm-6b", family={"rope": "pairs"}),
    "key heads in turn": Mistake("llama 3.1", code=key_heads_in_turn),
    "Gemma's 1 + w read as w": Mistake("gemma", family={"plus_one": False}),
    "the norms of a parallel block exchanged": Mistake("falcon 40b", model=norms_exchanged),
    "scores not divided by the number of the layer": Mistake("gpt2 scaled", family={"factor": None}),
    "Baichuan 2's head not normalised": Mistake("baichuan2 7b", family={"prepare": None}),
    "a head of its own ignored": Mistake("gpt2 unscaled", {"tie_embeddings": True}, code=head_kept_tied),
    # positions
    "positions that count the padding": Mistake("gpt2", code=lambda p: p.setattr(
        model_file, "count_positions", positions_with_pads)),
    "OPT's table two rows off": Mistake("opt", family={"prepare": first_rows_kept}),
    "slopes as if for a power of two": Mistake("bloom 12 heads", code=lambda p: p.setattr(
        model_file, "alibi_slopes", naive_slopes)),
    "slopes as if for a power of two (Baichuan)": Mistake("baichuan 13b", code=lambda p: p.setattr(
        model_file, "alibi_slopes", naive_slopes)),
    "ALiBi twice as steep": Mistake("mpt", {"alibi_max": 16.0}),
    "ALiBi not rounded to bf16": Mistake("falcon rw", {"alibi_rounded": False}),
    "RoPE over the whole head": Mistake("gpt_neox", {"rope_dim": None}),
    "another theta": Mistake("glm-4 9b", {"rope_theta": 10000.0}),
    "rope_ratio taken for theta": Mistake("chatglm2 32k", {"rope_scaling": None, "rope_theta": 40000.0}),
    "rope_scaling ignored": Mistake("llama 3.1", {"rope_scaling": None}),
    "dynamic RoPE ignored": Mistake("internlm rotary", {"rope_scaling": None}),
    "longrope's short factors for long texts": Mistake("phi3 long", lambda c: replace(c, rope_scaling={
        **c.rope_scaling, "short_factor": [1.0] * 6})),
    "theta of local and global layers exchanged": Mistake("gemma3", lambda c: replace(
        c, rope_theta=c.rope_theta_local, rope_theta_local=c.rope_theta)),
    "yarn in the layers with a window too": Mistake("olmo3 long", {"rope_theta_local": None}),
    "layers without RoPE shifted by one": Mistake("smollm3", lambda c: replace(
        c, no_rope_layers=[i - 1 for i in c.no_rope_layers])),
    "RoPE in every layer": Mistake("cohere2", {"no_rope_layers": ()}),
    "RoPE's frequencies not rounded to fp16": Mistake("chatglm-6b", code=lambda p: p.setattr(
        Tensor, "half", lambda t: t)),
    "positions that run on behind <sop>": Mistake("chatglm-6b", code=SOP_AS_HOLE),
    "positions that run on behind <sop> (GLM-10B)": Mistake("glm-10b", code=SOP_AS_HOLE),
    "blocks counted from zero": Mistake("glm-10b", code=BLOCKS_FROM_ZERO),
    "[gMASK] before an earlier [MASK]": Mistake("glm-10b", lambda c: replace(c, prefix_ids=(8, 7))),
    # what sees what
    "a causal prefix": Mistake("chatglm-6b", code=lambda p: p.setattr(
        model_file, "attention_bias", without_context(model_file.attention_bias))),
    "a window one too wide": Mistake("mistral 0.1", lambda c: replace(c, window=c.window + 1)),
    "a window one too narrow": Mistake("gpt_neo", lambda c: replace(c, window=c.window - 1)),
    "no window": Mistake("starcoder2", {"window": None}),
    "a window in the other layers": Mistake("gemma2", {"full_layers": (0, 2)}),
    "a window in every layer": Mistake("olmo3", {"full_layers": ()}),
    # scores and stream
    "scores divided by sqrt(D)": Mistake("gpt_neo", {"attention_scale": None}),
    "scores not divided by query_pre_attn_scalar": Mistake("gemma2", {"attention_scale": None}),
    "no cap on the scores": Mistake("gemma2", {"attention_softcap": None}),
    "no cap on the logits": Mistake("gemma2", {"final_softcap": None}),
    "q, k, v not clipped": Mistake("mpt clip", {"clip_qkv": None}),
    "norms of q and k over each head": Mistake("olmo2", model=norms_of_each_head),
    "no norms of q and k": Mistake("qwen3", model=lambda m: [setattr(layer.self_attn, n, nn.Identity()) for layer in
                                                             m.layers for n in ("q_norm", "k_norm")]),
    "embeddings not scaled": Mistake("gemma", {"embed_scale": 1.0}),
    "embeddings not normalised": Mistake("bloom", model=lambda m: setattr(m, "embed_norm", nn.Identity())),
    "attention and MLP one after the other": Mistake("gpt_neox", {"parallel": 0}),
    "attention and MLP side by side": Mistake("redpajama", {"parallel": 2}),
    "norms in front instead of behind": Mistake("openai-gpt", {"block": "pre"}),
    "norms in front instead of behind (OPT 350m)": Mistake("opt 350m", {"block": "pre"}),
    "the residual is x, not norm(x)": Mistake("bloom residual", {"residual_from_norm": 0.0}),
    "the residual not times sqrt(2 L)": Mistake("chatglm-6b", {"residual_from_norm": 1.0}),
    "the last layer asks as all others": Mistake("codegeex", model=lambda m: setattr(m.config, "top_query", "")),
    "the final norm behind the layer that asks": Mistake("pangu port", {"top_query": "before"}),
    "the residual multiplier lost": Mistake("granite", family={"factor": None}),
    "the logits' multiplier lost": Mistake("cohere", family={"factor": None}),
    "the constants of MiniCPM lost": Mistake("minicpm", family={"factor": None}),
    "eps 1e-5 for 1e-6": Mistake("small embeddings", {"norm_eps": 1e-5}),
}


# ---------------------------------------------------------------- the same texts and references as the parity tests

@functools.cache
def expectation(name: str, folder: Path) -> tuple[list, list]:
    """Writes the case; ([(ids, mask)], [logits]): two whole texts, then the first part of one behind some padding."""
    if name in remote_cases.CASES:
        case = remote_cases.CASES[name]
        state = remote_cases.tensors(case)
        state = {n: t.half().float() for n, t in state.items()} if "fp16" in case.form else state
        remote_cases.write(case, folder, state)
        reference, texts = case.reference(state), case.texts
        short = case.prompts[0]
    else:
        theirs = theirs_of(name)
        theirs.save_pretrained(folder)
        texts = random_ids(2, 40).tolist()
        short = texts[0][:11]

        def reference(ids: list[int]) -> Tensor:
            return test_families.theirs_on(theirs, torch.tensor([ids]))[0]
    left = torch.tensor([[9] * 5 + short]), torch.tensor([[0] * 5 + [1] * len(short)])
    return [*((torch.tensor([t]), None) for t in texts), left], [*(reference(t) for t in texts), reference(short)]


def theirs_of(name: str):
    """"small embeddings": so small that the eps of the norms is not lost in their squares."""
    if name != "small embeddings":
        return test_families.theirs_of(name)
    theirs = test_families.theirs_of("qwen2 window")
    theirs.model.embed_tokens.weight.data.mul_(0.02)
    return theirs


def furthest(model: Transformer, inputs: list, expected: list) -> float:
    """The largest error over the texts; not a number counts as infinite."""
    errors = [error(model(ids, mask)[0][-len(want):], want) for (ids, mask), want in zip(inputs, expected)]
    return max(math.inf if math.isnan(e) else e for e in errors)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda name: tmp_path_factory.mktemp("model"))


def make(mistake: Mistake, patch: PATCH, family_name: str) -> None:
    right = families.FAMILIES[family_name]
    wrong = mistake.family(right) if callable(mistake.family) else replace(right, **(mistake.family or {}))
    if mistake.config:
        change = mistake.config if callable(mistake.config) else lambda c: replace(c, **mistake.config)
        wrong = replace(wrong, config=lambda raw: change(right.config(raw)))
    patch.setitem(families.FAMILIES, family_name, wrong)
    if mistake.code:
        mistake.code(patch)


@torch.no_grad()
@pytest.mark.parametrize("name", MISTAKES)
def test_the_parity_tests_would_see(name, folder_of, monkeypatch):
    mistake = MISTAKES[name]
    folder = folder_of(mistake.case)
    inputs, expected = expectation(mistake.case, folder)
    right = checkpoints.load(folder)[0]
    assert furthest(right, inputs, expected) < TOLERANCE
    make(mistake, monkeypatch, next(n for n, f in families.FAMILIES.items() if f is right.origin.family))
    wrong = checkpoints.load(folder)[0]
    if mistake.model:
        mistake.model(wrong)
    found = furthest(wrong, inputs, expected)
    assert found > 10 * TOLERANCE, f"{name}: {found:.1e}"
