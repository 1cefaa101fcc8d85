"""The transformer: a decoder of the LLaMA family in one file, driven by one config.

    x = embed(ids)
    for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = lm_head(norm(x))

Attention is softmax(q k^T / sqrt(D) + bias) v. Position enters in one of two ways: RoPE rotates q and k by an angle
that grows with the position (Su et al. 2021, arXiv 2104.09864), ALiBi adds a penalty that grows with the distance
(Press et al. 2022, arXiv 2108.12409). Parameter names are those of the public LLaMA files without the leading
"model.", so that loading is "strip the prefix, then strict"; q, k, v and gate, up stay separate matrices, which keeps
LoRA short.

Shapes:  B batch   T tokens   S cached tokens   C width   H heads   K key/value heads   D head dim   V vocabulary

One integer `mask` (B, T) says everything about padding and packing:
    0 = padding, 1 = a real token; in packed rows 1, 2, 3, ... = the number of the document that the token belongs to.
    A token sees the earlier tokens with its own number, and positions count the real tokens of its own document:

        mask       0 0 1 1 1      left padding        mask       1 1 1 2 2 0    two documents packed, one pad
        positions  0 0 0 1 2                          positions  0 1 2 0 1 0

    mask=None means that every token is real. It may also be used for right-padded rows: a causal model never looks at
    what follows.

    from checkpoints import load; m, t = load('smollm2-135m'); t.decode(m.generate(t.prompt('Hi'), 9)[0])
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    """One config for every decoder. A field exists only where the computation differs: load rewrites layouts."""
    # --- size ---
    vocab_size: int = 32000
    hidden_size: int = 4096            # C
    intermediate_size: int = 11008     # width inside the MLP
    num_layers: int = 32
    num_heads: int = 32                # H
    num_kv_heads: int | None = None    # K < H: grouped-query attention; 1: multi-query; None: H
    head_dim: int | None = None        # D; None: C / H
    max_positions: int = 2048          # the length it was trained on; dynamic RoPE stretches beyond it
    # --- norm ---
    norm_eps: float = 1e-6
    # --- positions ---
    positions: str = "rope"            # rope | alibi | none
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # {"rope_type": default | linear | dynamic | llama3 | yarn | factors, ...}
    # --- attention and MLP ---
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"           # the gate of the MLP
    # --- head ---
    tie_embeddings: bool = False       # the head is the embedding, one tensor

    def __post_init__(self):
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.positions not in ("rope", "alibi", "none"):
            raise ValueError(f"unknown positions {self.positions!r}; known: rope, alibi, none")
        if self.rope_scaling and "rope_type" not in self.rope_scaling and "type" in self.rope_scaling:
            self.rope_scaling = {"rope_type": self.rope_scaling["type"], **self.rope_scaling}   # the spelling of 2023
        if self.positions == "rope":
            rope_frequencies(self)     # an unknown or incomplete rope_scaling is an error here, not at the first batch


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


# ---------------------------------------------------------------- norm

class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4); the mean of squares is taken in fp32."""
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:                                    # (..., C)
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


# ---------------------------------------------------------------- positions

def rope_frequencies(config: ModelConfig, length: int = 0) -> tuple[Tensor, float]:
    """Angle per position for each of the D/2 rotated pairs (D/2,), and the factor that yarn puts on cos and sin.
    `length` is the longest position in use: only dynamic scaling asks for it."""
    scaling = dict(config.rope_scaling or {})
    kind = scaling.get("rope_type", "default")
    dim, base = config.head_dim, config.rope_theta
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    trained = scaling.get("original_max_position_embeddings") or config.max_positions
    try:
        if kind == "default":
            return base ** -exponent, 1.0
        if kind == "linear":           # position interpolation (Chen et al. 2023): positions are squeezed by the factor
            return base ** -exponent / scaling["factor"], 1.0
        if kind == "factors":          # a GGUF file ships the divisors of llama3 scaling as a table
            return base ** -exponent / torch.as_tensor(scaling["factors"], dtype=torch.float32), 1.0
        if kind == "dynamic":          # NTK-aware: the base grows once the text is longer than the training length
            factor, stretch = scaling["factor"], max(length, trained) / trained
            return (base * (factor * stretch - (factor - 1)) ** (dim / (dim - 2))) ** -exponent, 1.0
        if kind == "llama3":
            return llama3_frequencies(base ** -exponent, scaling, trained), 1.0
        if kind == "yarn":
            return yarn_frequencies(base, dim, scaling, trained)
    except KeyError as missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {missing}: {config.rope_scaling}") from None
    raise ValueError(f"unknown rope type {kind!r}; known: default, linear, dynamic, llama3, yarn, factors")


def llama3_frequencies(freq: Tensor, scaling: dict, trained: int) -> Tensor:
    """Llama 3.1: slow pairs (wavelength over trained/low) are divided by the factor, fast ones kept, others blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = trained * freq / (2 * math.pi)  # how often a pair turns in the trained length
    keep = ((turns - low) / (high - low)).clamp(0, 1)                          # 0: slow pair, 1: fast pair
    return (1 - keep) * freq / scaling["factor"] + keep * freq


def yarn_frequencies(base: float, dim: int, scaling: dict, trained: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, eq. 17-22): a ramp over the pair's index, and warmer attention."""
    factor = scaling["factor"]
    freq = base ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)

    def pair_that_turns(times: float) -> float:                                # in the trained length
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)

    def warmth(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")         # DeepSeek's spelling
        attention = warmth(scaling["mscale"]) / warmth(scaling["mscale_all_dim"]) if both else warmth()
    return freq / factor * ramp + freq * (1 - ramp), attention


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D) for the positions (B, T). Angles stay in fp32: in bf16 position 257 would equal 256."""
    dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
    freq, factor = rope_frequencies(config, int(positions.max()) + 1 if dynamic else 0)
    angle = positions[:, None, :, None].float() * freq.to(positions.device)    # (B, 1, T, D/2)
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + D/2]) by its angle: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def alibi_slopes(heads: int) -> Tensor:
    """The penalty per token of distance, one per head: 2^(-8/n), 2^(-16/n), ... for n = 2^k heads (8 heads: 1/2 ...
    1/256); other counts take the next lower power of two and fill up with every other slope of the next higher one."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return torch.tensor(slopes)


def count_positions(docs: Tensor) -> Tensor:
    """(B, S) mask -> (B, S) positions that count the real tokens of each document (drawn at the top of the file)."""
    real = docs > 0
    count = real.long().cumsum(1) - 1
    seen = F.pad(docs.cummax(1).values[:, :-1], (1, 0))                        # the highest document number so far
    start = (count * (docs > seen)).cummax(1).values                           # where the document of each token began
    return (count - start) * real


# ---------------------------------------------------------------- attention

SHORT = 256      # queries up to which a CPU does better with plain matrix products than with the library's attention


class Cache:
    """Keys and values of the tokens seen so far, allocated once: k, v (layers, B, K, S, D), docs their mask (B, S)."""
    def __init__(self, config: ModelConfig, batch: int, size: int, device, dtype):
        shape = (config.num_layers, batch, config.num_kv_heads, size, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.docs = torch.zeros(batch, size, dtype=torch.int64, device=device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, D) behind the tokens seen so far and returns all of them (B, K, S + T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only: a row that has ended must not cost anything any more."""
        self.k, self.v, self.docs = self.k[:, rows], self.v[:, rows], self.docs[rows]


def attention_bias(config: ModelConfig, docs: Tensor, queries: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, (B, 1 or H, T, S): -inf where a token must not look, ALiBi's penalty elsewhere.
    docs (B, S) is the mask of all keys, of which the last T are also the queries."""
    S = docs.shape[1]
    index = torch.arange(S, device=docs.device)
    ask, rows = docs[:, S - queries:, None], index[S - queries:, None]         # (B, T, 1), (T, 1)
    see = (ask == docs[:, None]) & (docs[:, None] > 0) & (index <= rows)       # (B, T, S)
    see = (see | (index == rows))[:, None]             # a pad sees itself: a row without any key would be NaN
    bias = torch.zeros(see.shape, dtype=dtype, device=docs.device).masked_fill_(~see, -math.inf)
    if config.positions == "alibi":
        distance = positions[:, -queries:, None] - positions[:, None]          # (B, T, S)
        slopes = alibi_slopes(config.num_heads).to(docs.device)
        bias = (bias - slopes[:, None, None] * distance[:, None].clamp(min=0)).to(dtype)
    return bias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). bias None: causal, all tokens real."""
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    if bias is not None and (T == 1 or (T <= SHORT and q.device.type == "cpu")):
        # Attention as on paper, with the G heads that share a key head folded into the rows of one matrix: no key is
        # copied. On a CPU it is five times faster than the library's attention for short rows, ten for one token.
        scores = (q.reshape(B, K, G * T, D) @ k.transpose(2, 3)).view(B, K, G, T, -1) / math.sqrt(D)
        scores = scores + bias.view(B, -1, max(1, bias.shape[1] // K), T, bias.shape[-1])    # (B, K, G, T, S)
        probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (probs.view(B, K, G * T, -1) @ v).view(B, H, T, D)
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, D
        self.q_proj = nn.Linear(C, self.heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, C, bias=config.out_bias)

    def forward(self, x: Tensor, rope: tuple | None, bias: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)       # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)    # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attend(q, k, v, bias)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.down_proj = nn.Linear(I, C, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple | None, bias: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------- the model

class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing = False       # True: keep only the input of each layer, recompute the rest in backward
        self.recompute_context = None    # lora.py sets it: the recomputation must see the adapter of the forward
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std); what writes into the residual stream is scaled down by sqrt(2 * layers), as in GPT-2."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.num_layers) if residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One tensor for embedding and head where the config says so; call it again after assigning loaded weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm. With a cache the ids follow the tokens that are in it."""
        B, T = ids.shape
        x = self.embed_tokens(ids)
        docs, positions, bias = self.layout(ids, mask, cache, x.dtype)
        rope = rope_tables(self.config, positions[:, -T:], x.dtype) if self.config.positions == "rope" else None
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                context = {"context_fn": self.recompute_context} if self.recompute_context else {}
                x = checkpoint(layer, x, rope, bias, cache, i, use_reentrant=False, **context)
            else:
                x = layer(x, rope, bias, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def layout(self, ids: Tensor, mask: Tensor | None, cache: Cache | None, dtype: torch.dtype):
        """Which tokens see which, and where they stand: (docs (B, S), positions (B, S or T), bias or None)."""
        B, T = ids.shape
        causal_only = mask is None and (cache is None or cache.length == 0) and self.config.positions != "alibi"
        causal_only &= T > SHORT or ids.device.type != "cpu"
        if mask is None:
            mask = torch.ones_like(ids)
        if cache is not None:
            cache.docs[:, cache.length:cache.length + T] = mask
            docs = cache.docs[:, :cache.length + T]
        else:
            docs = mask
        positions = count_positions(docs)
        if causal_only:
            return docs, positions, None
        return docs, positions, attention_bias(self.config, docs, T, positions, dtype)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask as drawn at the top of the file -> (B, T, V) logits."""
        return self.lm_head(self.hidden(ids, mask))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, eos_ids: Iterable[int] = (),
                 generator: torch.Generator | None = None, pad_id: int = 0,
                 on_token: Callable[[Tensor], None] | None = None, logprobs: list[Tensor] | None = None) -> Tensor:
        """(B, P) prompts, padded on either side -> (B, n) new tokens, n <= max_new_tokens; 0.0 = greedy; a row keeps
        its end token and is filled with pad_id behind it. on_token((B,) ids) is called after every step; a list given
        as logprobs receives one (B,) tensor a step: the log-probability with which each token was drawn."""
        ids, mask = left_pad(ids, mask)
        B, P = ids.shape
        cache = Cache(self.config, B, P + max_new_tokens, ids.device, self.embed_tokens.weight.dtype)
        ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=ids.device)
        out = torch.full((B, max_new_tokens), pad_id, dtype=torch.int64, device=ids.device)
        rows = torch.arange(B, device=ids.device)          # the rows still in the cache, by their number in the batch
        alive = torch.ones(B, dtype=torch.bool, device=ids.device)
        h = self.hidden(ids, None if bool(mask.all()) else mask, cache)[:, -1]
        for t in range(max_new_tokens):
            noise = None if temperature == 0 else torch.rand(B, generator=generator, device=ids.device)[rows]
            new, logp = sample(self.lm_head(h), noise, temperature, top_k, top_p)       # (rows,), (rows,)
            out[rows[alive], t] = new[alive]
            if logprobs is not None:
                logprobs.append(torch.zeros(B, device=ids.device).index_copy(0, rows[alive], logp[alive]))
            if on_token is not None:
                on_token(out[:, t])
            alive = alive & ~torch.isin(new, ends)
            left = int(alive.sum())
            if left == 0:
                return out[:, :t + 1]
            if t + 1 == max_new_tokens:
                break
            if left <= 0.9 * len(alive):                   # dropping rows copies the cache: do it when it pays
                cache.keep(alive)
                rows, new, alive = rows[alive], new[alive], alive[alive]
            h = self.hidden(new[:, None], None, cache)[:, 0]
        return out


def left_pad(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Moves the padding of each row to its left, so that the last column holds the last real token of every row.
    ids [[5, 6, 0], [7, 8, 9]], mask [[1, 1, 0], [1, 1, 1]] -> [[0, 5, 6], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]]"""
    if mask is None:
        return ids, torch.ones_like(ids)
    assert bool((mask > 0).any(1).all()), "a row of the batch has no real token: generate needs at least one per prompt"
    order = (mask > 0).long().argsort(dim=1, stable=True)      # pads first, real tokens keep their order
    return ids.gather(1, order), (mask > 0).long().gather(1, order)


def sample(logits: Tensor, noise: Tensor | None, temperature: float, top_k: int | None = None,
           top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniform noise -> (B,) ids and their log-probabilities, by inverting the cumulative
    distribution: a row's draw depends on its own noise only, so it gives the same text whoever else is in the batch.
    noise None = greedy."""
    logits = logits.float()
    if noise is None:
        best = logits.max(-1)
        check_finite(best.values)
        return best.indices, best.values - logits.logsumexp(-1)
    logits = logits if temperature == 1 else logits / temperature
    if top_k and top_k < logits.shape[-1]:             # 0, like None: all tokens
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        drop = sorted_probs.cumsum(-1) - sorted_probs >= top_p                 # the token that crosses top_p stays
        drop[:, 0] = False                                                     # and the best one always, also with 0.0
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), 0.0)
    # In two steps, a block of tokens and a token of the block: a running sum over 50,000 tokens would take a tenth of
    # the whole time of sampling.
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    block, rest, total = pick(blocks.sum(-1), noise)
    check_finite(total)
    inside = blocks[torch.arange(len(probs), device=probs.device), block]      # (B, BLOCK)
    new = block * BLOCK + pick(inside, rest / inside.sum(-1))[0]
    return new, (probs.gather(1, new[:, None])[:, 0] / total).log()


BLOCK = 256


def pick(weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n) weights >= 0, (B,) noise in [0, 1) -> the item that noise * sum falls on, how far into it, and the sum."""
    heights = weights.cumsum(-1)                                               # (B, n)
    total = heights[:, -1]
    target = noise[:, None] * total[:, None]
    new = torch.searchsorted(heights, target, right=True)                      # first index with height > target
    # Where the sum is complete: rounding may not carry the draw to an impossible item behind it.
    new = torch.minimum(new, (heights < total[:, None]).sum(-1, keepdim=True))
    before = heights.gather(1, new) - weights.gather(1, new)
    return new[:, 0], (target - before).clamp(min=0)[:, 0], total


def check_finite(x: Tensor) -> None:
    """(B,) one number per row that is not finite where the row's logits are not."""
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero().flatten().tolist()
        raise FloatingPointError(f"logits of rows {bad} are not finite: the weights or the last update are broken")
