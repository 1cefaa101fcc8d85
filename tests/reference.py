"""Models that no library at hand can run, written down a second time: the naive way, in float64, one text at a time,
from the papers and from what the published files hold. Nothing here comes from model.py or checkpoints/, so a mistake
would have to be made twice, in two different forms.

    state   the tensors of a file, by the file's own names
    ids     one text, a list of T numbers
    ->      (T, V) logits
"""
import math

import torch
from torch import Tensor


class Weights:
    """The tensors of a file in float64; w("a.b") is the weight of a.b, w.linear("a.b", x) applies it."""
    def __init__(self, state: dict[str, Tensor], prefix: str = ""):
        self.state = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items()}

    def __call__(self, name: str) -> Tensor:
        return self.state[name + ".weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self(name).T
        return y + self.state[name + ".bias"] if name + ".bias" in self.state else y

    def layer_norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred ** 2).mean(-1, keepdim=True) + eps).sqrt() * self(name) + self.state[name + ".bias"]

    def rms_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / ((x ** 2).mean(-1, keepdim=True) + eps).sqrt() * self(name)


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def gelu_fast(x: Tensor) -> Tensor:
    """MindSpore's FastGelu."""
    return x / (1 + torch.exp(-1.702 * x))


def attention(q: list[Tensor], k: list[Tensor], v: list[Tensor], sees: list[list[int]], slopes: list[float] = ()):
    """q, k, v: T tensors (H, D); sees[t]: what token t looks at; slopes: one for each head, times the position of the
    key, is added to the score (for one query this is ALiBi's penalty up to a constant, which softmax ignores)."""
    H, D = q[0].shape
    keys, values, rows = torch.stack(k), torch.stack(v), []                    # (T, H, D)
    for t, query in enumerate(q):
        heads = []
        for h in range(H):
            scores = keys[sees[t], h] @ query[h] / math.sqrt(D)
            if slopes:
                scores = scores + slopes[h] * torch.tensor(sees[t])
            share = torch.exp(scores - scores.max())
            heads.append(share / share.sum() @ values[sees[t], h])
        rows.append(torch.cat(heads))
    return torch.stack(rows)                                                   # (T, H D)


def causal(T: int) -> list[list[int]]:
    return [list(range(t + 1)) for t in range(T)]


def prefix(T: int, sop: int) -> list[list[int]]:
    """What stands before <sop> sees all of itself, the rest what has been written."""
    return [list(range(sop if t < sop else t + 1)) for t in range(T)]


# ---------------------------------------------------------------- ChatGLM-6B and GLM-10B

def turn_pairs(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Number i and number i + n of 2n turn together, by position * frequency i: a complex number times e^(i angle)."""
    real, imaginary = x.chunk(2)
    turned = torch.complex(real, imaginary) * torch.exp(1j * position * frequencies)
    return torch.cat((turned.real, turned.imag))


def chatglm_6b(state: dict[str, Tensor], raw: dict, ids: list[int]) -> Tensor:
    """One half of each head turns by the position in the text, the other by the position in the answer."""
    w, T = Weights(state, "transformer."), len(ids)
    H, D = raw["num_attention_heads"], raw["hidden_size"] // raw["num_attention_heads"]
    alpha, eps = math.sqrt(2 * raw["num_layers"]), raw["layernorm_epsilon"]
    sop = ids.index(raw["bos_token_id"])
    hole = ids.index(raw["gmask_token_id"] if raw["gmask_token_id"] in ids else raw["mask_token_id"])
    places = [(t, 0) if t < sop else (hole, t - sop + 1) for t in range(T)]
    frequencies = torch.tensor([10000 ** (-2 * i / (D // 2)) for i in range(D // 4)]).half().double()
    x = w("word_embeddings")[ids]
    for i in range(raw["num_layers"]):
        at = f"layers.{i}."
        h = w.layer_norm(at + "input_layernorm", x, eps)
        q, k, v = w.linear(at + "attention.query_key_value", h).view(T, H, 3, D).unbind(2)
        q, k = ([torch.stack([torch.cat((turn_pairs(head[:D // 2], a, frequencies), turn_pairs(head[D // 2:], b,
                                                                                               frequencies)))
                              for head in part[t]]) for t, (a, b) in enumerate(places)] for part in (q, k))
        x = h * alpha + w.linear(at + "attention.dense", attention(q, k, list(v), prefix(T, sop)))
        h = w.layer_norm(at + "post_attention_layernorm", x, eps)
        x = h * alpha + w.linear(at + "mlp.dense_4h_to_h", gelu_tanh(w.linear(at + "mlp.dense_h_to_4h", h)))
    return w.layer_norm("final_layernorm", x, eps) @ state["lm_head.weight"].double().T


def glm_10b(state: dict[str, Tensor], raw: dict, ids: list[int], sop_id: int, holes: list[int]) -> Tensor:
    """Two tables of positions; the hole is the first of any kind; q, k and v are thirds; a tied head."""
    state = {name.removeprefix("glm.").removeprefix("transformer."): t for name, t in state.items()}
    w, T = Weights(state), len(ids)
    H, D = raw["num_attention_heads"], raw["hidden_size"] // raw["num_attention_heads"]
    sop, hole = ids.index(sop_id), min(t for t, token in enumerate(ids) if token in holes)
    x = w("word_embeddings")[ids]
    for t in range(T):
        x[t] += w("position_embeddings")[t if t < sop else hole]
        x[t] += w("block_position_embeddings")[0 if t < sop else t - sop + 1]
    for i in range(raw["num_layers"]):
        at = f"layers.{i}."
        h = w.layer_norm(at + "input_layernorm", x)
        q, k, v = w.linear(at + "attention.query_key_value", h).view(T, 3, H, D).unbind(1)
        x = x + w.linear(at + "attention.dense", attention(list(q), list(k), list(v), prefix(T, sop)))
        h = w.layer_norm(at + "post_attention_layernorm", x)
        x = x + w.linear(at + "mlp.dense_4h_to_h", gelu_erf(w.linear(at + "mlp.dense_h_to_4h", h)))
    return w.layer_norm("final_layernorm", x) @ w("word_embeddings").T


# ---------------------------------------------------------------- PanGu-alpha and CodeGeeX

PANGU = {"layer": "h.{}.", "norm1": "ln_1", "norm2": "ln_2", "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj",
         "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "words": "wte", "places": "wpe", "asks": "wqe",
         "last": "ln_f", "top": "h.{}."}
CODEGEEX = {"layer": "transformer.layers.{}.", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
            "q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "attention.dense",
            "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "words": "embedding.word_embeddings",
            "places": "embedding.position_embeddings", "asks": "topQueryEmbedding.top_query_embeddings",
            "last": "transformer.final_layernorm", "top": "transformer.topQueryLayer."}


def top_query(state: dict[str, Tensor], names: dict[str, str], layers: int, heads: int, ids: list[int], act,
              norm_first: bool, prefix: str = "") -> Tensor:
    """GPT-2's layers; the last one takes its queries from a table of positions. norm_first: the final norm stands in
    front of that layer, not behind it. `layers` counts it."""
    w, T = Weights(state, prefix), len(ids)
    x = torch.stack([w(names["words"])[token] + w(names["places"])[t] for t, token in enumerate(ids)])
    for i in range(layers):
        last = i == layers - 1
        at = names["top" if last else "layer"].format(i)
        x = w.layer_norm(names["last"], x) if last and norm_first else x
        h = w.layer_norm(at + names["norm1"], x)
        asking = w(names["asks"])[:T] if last else h
        q, k, v = (list(w.linear(at + names[part], source).view(T, heads, -1))
                   for part, source in (("q", asking), ("k", h), ("v", h)))
        x = x + w.linear(at + names["out"], attention(q, k, v, causal(T)))
        x = x + w.linear(at + names["down"], act(w.linear(at + names["up"], w.layer_norm(at + names["norm2"], x))))
    x = x if norm_first else w.layer_norm(names["last"], x)
    return x @ w(names["words"]).T


# ---------------------------------------------------------------- a LLaMA with ALiBi

def slopes_of(heads: int) -> list[float]:
    """Of the ALiBi paper: 2^(-8/n), 2^(-16/n) .. for a power of two n; otherwise those of the power of two below, and
    then every other one of the power of two above."""
    below = 1 << (heads.bit_length() - 1)
    steps = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    return steps + [2 ** (-8 * (i + 1) / (2 * below)) for i in range(2 * below)][0::2][:heads - below]


def baichuan_13b(state: dict[str, Tensor], raw: dict, ids: list[int], normalised: bool = False) -> Tensor:
    w, T, eps, H = Weights(state, "model."), len(ids), raw["rms_norm_eps"], raw["num_attention_heads"]
    x = w("embed_tokens")[ids]
    for i in range(raw["num_hidden_layers"]):
        at = f"layers.{i}."
        q, k, v = w.linear(at + "self_attn.W_pack", w.rms_norm(at + "input_layernorm", x, eps)).view(T, 3, H,
                                                                                                     -1).unbind(1)
        x = x + w.linear(at + "self_attn.o_proj", attention(list(q), list(k), list(v), causal(T), slopes_of(H)))
        h = w.rms_norm(at + "post_attention_layernorm", x, eps)
        gate, up = w.linear(at + "mlp.gate_proj", h), w.linear(at + "mlp.up_proj", h)
        x = x + w.linear(at + "mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)
    head = w("lm_head")
    head = head / (head ** 2).sum(1, keepdim=True).sqrt() if normalised else head
    return w.rms_norm("norm", x, eps) @ head.T
