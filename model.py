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
import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import blocks, glu, norm, rope
from kernels.backend import use_triton
from kernels.bounds import Bounds, bounds
from sampling import Cache, Layout, StaticCache, decode, decode_static, left_pad, one_adapter, packed, shared


@dataclass
class ModelConfig:
    """One config for every decoder. A field exists only where the computation differs: load rewrites layouts. The
    defaults are a LLaMA's; the names in brackets are the families that need another value."""
    # --- size ---
    vocab_size: int = 32000
    hidden_size: int = 4096            # C
    intermediate_size: int = 11008     # width inside the MLP
    num_layers: int = 32
    num_heads: int = 32                # H
    num_kv_heads: int | None = None    # K < H: grouped-query attention; 1: multi-query; None: H
    head_dim: int | None = None        # D; None: C / H
    max_positions: int = 2048          # the length it was trained on; learned positions and dynamic RoPE need it
    # --- norm ---
    norm: str = "rms"                  # rms | layer
    norm_eps: float = 1e-6
    norm_weight: bool = True           # a learned factor per channel [False: OLMo 1, nanochat]
    norm_bias: bool = True             # only of a LayerNorm [False: MPT]
    # --- block ---
    block: str = "pre"                 # where the norms stand: pre | post [GPT-1] | sandwich [Gemma 2] | inner [OLMo 2]
    parallel: int = 0                  # attention and MLP side by side, with 1 norm [GPT-J] or 2 [NeoX] in front
    final_norm: bool = True            # [False: post-norm models]
    residual_from_norm: float = 0.0    # the residual is norm(x) times this, not x [ChatGLM-6B]
    # --- embedding ---
    embed_scale: float = 1.0           # [Gemma: sqrt(C)]
    embed_norm: bool = False           # a norm behind the embedding [BLOOM]
    tie_embeddings: bool = False       # the head is the embedding, one tensor
    # --- positions ---
    positions: str = "rope"            # rope | learned | alibi | none | rope_2d [ChatGLM-6B] | learned_2d [GLM-10B]
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # {"rope_type": default | linear | dynamic | llama3 | yarn | longrope | factors}
    rope_dim: int | None = None        # how many numbers of a head turn; None: all [NeoX, GPT-J, Phi, GLM: some]
    rope_theta_local: float | None = None      # theta of the layers with a window [Gemma 3]
    no_rope_layers: tuple[int, ...] = ()       # layers that know no positions [SmolLM3]
    alibi_max: float = 8.0             # the steepest slope is 2^-alibi_max/n, the flattest 2^-alibi_max
    alibi_rounded: bool = False        # penalties pass through bf16 and are scaled like the scores [Falcon-RW]
    # --- attention ---
    qkv_bias: bool = False
    out_bias: bool = False
    attention_scale: float | None = None       # None: 1 / sqrt(D)
    attention_softcap: float | None = None     # scores pass through cap * tanh(scores / cap) [Gemma 2]
    qk_norm: str = ""                  # of q and k: head | own (weights for each head) | full (over all heads)
    clip_qkv: float | None = None      # q, k, v are clamped to +-clip [MPT-storywriter, OLMo]
    window: int | None = None          # a token sees itself and window - 1 before it [Mistral 0.1] ...
    full_layers: tuple[int, ...] = ()  # ... but in these layers everything [Gemma, GPT-Neo]
    prefix_ids: tuple[int, ...] = ()   # <sop>, [gMASK], [MASK] ..: what stands before <sop> sees all of itself [GLM]
    top_query: str = ""                # the last layer asks with positions: before | after the final norm [PanGu]
    # --- MLP ---
    activation: str = "silu"
    glu: bool = True                   # down(act(gate(x)) * up(x)); False: down(act(up(x)))
    mlp_bias: bool = False
    # --- head ---
    head_bias: bool = False            # [GPT-J, Phi]
    final_softcap: float | None = None         # of the logits [Gemma 2]

    def __post_init__(self):
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        self.no_rope_layers, self.full_layers, self.prefix_ids = (
            tuple(x) for x in (self.no_rope_layers, self.full_layers, self.prefix_ids))        # JSON knows lists only
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")
        if self.positions.endswith("2d") != (len(self.prefix_ids) > 1):
            raise ValueError(f"positions {self.positions!r} with prefix_ids {self.prefix_ids}: GLM needs the ids of "
                             "<sop> and of the holes, [gMASK] first; others have none")
        if self.rope_scaling and "rope_type" not in self.rope_scaling and "type" in self.rope_scaling:
            self.rope_scaling = {"rope_type": self.rope_scaling["type"], **self.rope_scaling}   # the spelling of 2023
        if self.positions == "rope":
            rope_frequencies(self)     # an unknown or incomplete rope_scaling is an error here, not at the first batch

    def windowed(self, layer: int) -> bool:
        return self.window is not None and layer not in self.full_layers


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(), "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
CHOICES = {"norm": ("rms", "layer"), "block": ("pre", "post", "sandwich", "inner"), "parallel": (0, 1, 2),
           "positions": ("rope", "learned", "alibi", "none", "rope_2d", "learned_2d"),
           "qk_norm": ("", "head", "own", "full"), "top_query": ("", "before", "after"),
           "activation": tuple(ACTIVATIONS)}


# ---------------------------------------------------------------- norm

class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4); the mean of squares is taken in fp32."""
    def __init__(self, size: int, eps: float, weight: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:                                    # (..., C)
        if use_triton(x):              # the same in one pass, rounded once; so everywhere below: a GPU runs kernels/
            return norm.rms_norm(x, self.weight, self.eps)
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        # A weight that load keeps in fp32 (Gemma's 1 + w) is applied before rounding, any other after it.
        return h.to(x.dtype) if self.weight is None else (self.weight * h.to(self.weight.dtype)).to(x.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over each head, with a factor of its own for every head (StableLM 2 12B)."""
    def __init__(self, heads: int, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads, 1, size)), eps

    def forward(self, x: Tensor) -> Tensor:                                    # (B, H, T, D)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(size, config.norm_eps, config.norm_weight)
    return nn.LayerNorm(size, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.norm_bias)


# ---------------------------------------------------------------- positions

def rope_frequencies(config: ModelConfig, length: int = 0, local: bool = False) -> tuple[Tensor, float]:
    """Angle per position for each rotated pair (rope_dim / 2,), and the factor that some scalings put on cos and sin.
    `length` is the longest position in use: dynamic and longrope ask for it. local: of the layers with a window."""
    scaling = {} if local else dict(config.rope_scaling or {})
    kind = scaling.get("rope_type", "default")
    dim, base = config.rope_dim or config.head_dim, config.rope_theta_local if local else config.rope_theta
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
        if kind == "longrope":         # divisors found by search (Ding et al. 2024, arXiv 2402.13753), for two lengths
            divisors = torch.as_tensor(scaling["long_factor" if length > trained else "short_factor"])
            factor = scaling.get("factor") or config.max_positions / trained
            warm = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
            return base ** -exponent / divisors, scaling.get("attention_factor") or warm
    except KeyError as missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {missing}: {config.rope_scaling}") from None
    raise ValueError(f"unknown rope type {kind!r}; known: default, linear, dynamic, llama3, yarn, longrope, factors")


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


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype, blocks: Tensor | None = None,
                local: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D) for the positions (B, T). Angles stay in fp32: in bf16 position 257 would equal 256.
    With blocks (B, T), the second kind of positions of ChatGLM-6B, half of the pairs turn by those."""
    if blocks is not None:             # its files were trained with frequencies in fp16
        dim = config.head_dim // 2
        freq = (1 / config.rope_theta ** (torch.arange(0, dim, 2).float() / dim)).half().float().to(positions.device)
        angle, factor = torch.cat([p[:, None, :, None].float() * freq for p in (positions, blocks)], dim=-1), 1.0
    else:
        asks = (config.rope_scaling or {}).get("rope_type") in ("dynamic", "longrope")
        freq, factor = rope_frequencies(config, int(positions.max()) + 1 if asks else 0, local)
        angle = positions[:, None, :, None].float() * freq.to(positions.device)                # (B, 1, T, D/2)
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + D/2]) by its angle: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). Where the
    tables are narrower than a head, the rest of the head stays as it is."""
    if (dim := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope.rope(q, k, cos, sin) if use_triton(q) else (rotate(q, cos, sin), rotate(k, cos, sin))


def alibi_slopes(heads: int, steepest: float = 8.0) -> Tensor:
    """The penalty per token of distance, one per head: 2^(-8/n), 2^(-16/n), ... for n = 2^k heads (8 heads: 1/2 ...
    1/256); other counts take the next lower power of two and fill up with every other slope of the next higher one."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-steepest * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-steepest / 2 * (2 * i + 1) / n) for i in range(heads - n)]
    return torch.tensor(slopes)


def count_positions(docs: Tensor) -> Tensor:
    """(B, S) mask -> (B, S) positions that count the real tokens of each document (drawn at the top of the file)."""
    real = docs > 0
    count = real.long().cumsum(1) - 1
    seen = F.pad(docs.cummax(1).values[:, :-1], (1, 0))                        # the highest document number so far
    start = (count * (docs > seen)).cummax(1).values                           # where the document of each token began
    return (count - start) * real


def prefix_layout(ids: Tensor, docs: Tensor, positions: Tensor, prefix_ids: tuple,
                  earliest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """GLM (Du et al. 2022, arXiv 2103.10360, section 2.1): text with a hole, <sop>, what fills the hole. From <sop> on
    positions stay at the hole and blocks count; the context sees all of itself. Without <sop> there is no context.
    ids a b [gMASK] <sop> x y -> positions 0 1 2 2 2 2, blocks 0 0 0 1 2 3, context 1 1 1 0 0 0     (B, S) each"""
    S = ids.shape[1]
    index = torch.arange(S, device=ids.device)
    same = (docs[:, :, None] == docs[:, None]) & (docs > 0)[:, None]           # (B, S, S)

    def first(token: int) -> Tensor:                                           # in one's own document; S = nowhere
        return torch.where((ids == token)[:, None] & same, index, S).amin(-1)

    sop, hole, *others = (first(token) for token in prefix_ids)
    for other in others:                               # ChatGLM-6B: the kind that is named first; GLM-10B: the earliest
        hole = torch.minimum(hole, other) if earliest else torch.where(hole < S, hole, other)
    behind = (index >= sop) & (docs > 0)
    blocks = (index - sop + 1) * behind
    positions = torch.where(behind & (hole < sop), positions.gather(1, hole.clamp(max=S - 1)), positions)
    return positions, blocks, (docs > 0) & (index < sop) & (sop < S)


# ---------------------------------------------------------------- attention

SHORT = 256      # queries up to which a CPU takes them all at once and keeps the scores; above it kernels/blocks.py


def attention_bias(config: ModelConfig, docs: Tensor, queries: int, positions: Tensor, dtype: torch.dtype,
                   context: Tensor | None = None, window: int | None = None) -> Tensor:
    """What is added to the scores, (B, 1 or H, T, S): -inf where a token must not look, ALiBi's penalty elsewhere.
    docs (B, S) is the mask of all keys, of which the last T are also the queries; context (B, S) what all may see."""
    S = docs.shape[1]
    index = torch.arange(S, device=docs.device)
    ask, rows = docs[:, S - queries:, None], index[S - queries:, None]         # (B, T, 1), (T, 1)
    see = index <= rows if context is None else (index <= rows) | context[:, None]
    if window is not None:
        see = see & (index > rows - window)
    see = see & (ask == docs[:, None]) & (docs[:, None] > 0)                   # (B, T, S)
    see = (see | (index == rows))[:, None]             # a pad sees itself: a row without any key would be NaN
    bias = torch.zeros(see.shape, dtype=dtype, device=docs.device).masked_fill_(~see, -math.inf)
    if config.positions != "alibi":
        return bias
    slopes = alibi_slopes(config.num_heads, config.alibi_max).to(docs.device)[:, None, None]   # (H, 1, 1)
    if config.alibi_rounded:
        rounded = (slopes.bfloat16() * positions[:, None, None].bfloat16()).float()
        return (bias + rounded / math.sqrt(config.head_dim)).to(dtype)
    distance = positions[:, -queries:, None] - positions[:, None]              # (B, T, S)
    return (bias - slopes * distance[:, None].clamp(min=0)).to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Bounds | None, scale: float | None = None,
           softcap: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). bias None: causal, all tokens real."""
    B, H, T, D = q.shape
    if isinstance(bias, Bounds):
        return bias.attend(q, k, v, scale, softcap)
    K, G, scale = k.shape[1], H // k.shape[1], scale or 1 / math.sqrt(D)
    if bias is not None and (T == 1 or (T <= SHORT and q.device.type == "cpu") or softcap):
        # Attention as on paper, with the G heads that share a key head folded into the rows of one matrix: no key is
        # copied. On a CPU it is five times faster than the library's attention for short rows, ten for one token.
        k, v = k.contiguous(), v.contiguous()          # or the product copies them, transposed number by number
        scores = (q.reshape(B, K, G * T, D) @ k.transpose(2, 3)).view(B, K, G, T, -1) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores + bias.view(B, -1, max(1, bias.shape[1] // K), T, bias.shape[-1])    # (B, K, G, T, S)
        probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (probs.view(B, K, G * T, -1) @ v).view(B, H, T, D)
    if q.device.type == "cpu":                         # with the gradient in half of the library's time
        return blocks.attend(q, k, v, bias, scale)
    if bias is None and q.is_cuda:                                             # there the library shares heads itself
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=G > 1)
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.out_bias)
        self.full, self.clip, self.head_dim = config.qk_norm == "full", config.clip_qkv, D
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (HeadNorm(n, D, config.norm_eps) if config.qk_norm == "own" else
                                        make_norm(config, n * D if self.full else D) for n in (H, K))

    def forward(self, x: Tensor, rope: tuple | None, bias: Tensor | None, cache: Cache | None, layer: int,
                asking: Tensor | None = None) -> Tensor:
        q, k, v = self.q_proj(x if asking is None else asking), self.k_proj(x), self.v_proj(x)
        if self.clip:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if self.full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))    # (B, H or K, T, D)
        if not self.full:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate_both(q, k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attend(q, k, v, bias, self.scale, self.softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6); without a gate down(act(up(x)))."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = nn.Linear(C, I, bias=config.mlp_bias) if config.glu else None
        self.up_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.down_proj = nn.Linear(I, C, bias=config.mlp_bias)
        self.act, self.kind = ACTIVATIONS[config.activation], config.activation

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(glu.glu(gate, up, self.kind) if self.kind in glu.KINDS else self.act(gate) * up)


class Block(nn.Module):
    """Attention and MLP on a stream x. LLaMA ("pre"):  x += attention(norm(x));  x += mlp(norm(x))"""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.post, self.parallel, self.residual = config.block == "post", config.parallel, config.residual_from_norm
        inside, outside = config.block != "inner", config.block in ("inner", "sandwich")
        names = {"input_layernorm": inside, "post_attention_layernorm": inside and config.parallel != 1,
                 "attention_out_norm": outside, "mlp_out_norm": outside}
        for name, there in names.items():
            setattr(self, name, make_norm(config, config.hidden_size) if there else nn.Identity())
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple | None, bias: Tensor | None, cache: Cache | None, layer: int,
                asking: Tensor | None = None) -> Tensor:
        if self.post:                                  # GPT-1: the stream itself is normalised after every addition
            x = self.input_layernorm(x + self.self_attn(x, rope, bias, cache, layer))
            return self.post_attention_layernorm(x + self.mlp(x))
        h = self.input_layernorm(x)
        a = self.attention_out_norm(self.self_attn(h, rope, bias, cache, layer, asking))
        if self.parallel:
            return x + a + self.mlp(h if self.parallel == 1 else self.post_attention_layernorm(x))
        x = (h * self.residual if self.residual else x) + a
        h = self.post_attention_layernorm(x)
        return (h * self.residual if self.residual else x) + self.mlp_out_norm(self.mlp(h))


# ---------------------------------------------------------------- the model

class Head(nn.Linear):
    """The head of a model whose logits are capped: cap * tanh(logits / cap)."""
    def __init__(self, *sizes: int, bias: bool, cap: float):
        super().__init__(*sizes, bias=bias)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


def linear_head(head: nn.Module) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and cap of a head that is on a GPU and nothing more than that: kernels.head then makes its loss
    without its logits. None: call it."""
    plain = type(head) in (nn.Linear, Head) and use_triton(head.weight)
    return (head.weight, head.bias, getattr(head, "cap", 0.0)) if plain else None


WORTH_PACKING = 16     # new tokens from which `generate` packs the matrices: that takes as long as five to ten tokens


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, V, P = config.hidden_size, config.vocab_size, config.max_positions
        self.embed_tokens = nn.Embedding(V, C)
        for name, there in (("embed_positions", config.positions.startswith("learned")),
                            ("embed_blocks", config.positions == "learned_2d"), ("embed_query", config.top_query)):
            setattr(self, name, nn.Embedding(P, C) if there else None)
        self.embed_norm = make_norm(config, C) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config, C) if config.final_norm else nn.Identity()
        cap = config.final_softcap
        self.lm_head = Head(C, V, bias=config.head_bias, cap=cap) if cap else nn.Linear(C, V, bias=config.head_bias)
        self.checkpointing = False       # True: keep only the input of each layer, recompute the rest in backward
        self.recompute_context = None    # lora.py sets it: the recomputation must see the adapter of the forward
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std); what writes into the residual stream is scaled down by sqrt(2 * layers), as in GPT-2."""
        for name, p in self.named_parameters():
            if p.is_meta:              # a shape without numbers: load fills it, the dry run needs no more
                continue
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
        h = self.through(ids, self.layout(ids, mask, cache), cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return h

    def through(self, ids: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """`hidden` of tokens whose place is known: all of its arithmetic, and no look at a number on the device."""
        config, (positions, blocks, biases, ropes) = self.config, layout
        x = self.embed_tokens(ids)
        x = x if config.embed_scale == 1 else x * torch.tensor(config.embed_scale, dtype=x.dtype)
        x = x if self.embed_positions is None else x + self.embed_positions(positions)
        x = self.embed_norm(x if self.embed_blocks is None else x + self.embed_blocks(blocks))
        for i, layer in enumerate(self.layers):
            local, asking = config.windowed(i), None
            if config.top_query and i == config.num_layers - 1:
                x, asking = self.norm(x) if config.top_query == "after" else x, self.embed_query(positions)
            where = (None if i in config.no_rope_layers else ropes[local], biases[local], cache, i, asking)
            if self.checkpointing and torch.is_grad_enabled():
                context = {"context_fn": self.recompute_context} if self.recompute_context else {}
                x = checkpoint(layer, x, *where, use_reentrant=False, **context)
            else:
                x = layer(x, *where)
        return x if config.top_query == "after" else self.norm(x)

    def layout(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Layout:
        """Without a mask every token is real; with a cache the tokens follow what is in it, which is noted there."""
        config, T, dtype = self.config, ids.shape[1], self.embed_tokens.weight.dtype
        plain = mask is None and (cache is None or cache.length == 0) and (T > SHORT or ids.device.type != "cpu")
        plain &= config.positions != "alibi" and not config.prefix_ids and not config.attention_softcap
        docs = torch.ones_like(ids) if mask is None else mask
        if cache is not None:
            new = slice(cache.length, cache.length + T)
            cache.docs[:, new], cache.ids[:, new] = docs, ids
            docs, ids = cache.docs[:, :new.stop], cache.ids[:, :new.stop]
        positions, blocks, context, S = count_positions(docs), None, None, docs.shape[1]
        if config.positions.startswith("learned") and S > config.max_positions <= (last := int(positions.max())):
            raise ValueError(f"a text of {last + 1} tokens, this model has learned {config.max_positions} positions")
        if config.prefix_ids:
            positions, blocks, context = prefix_layout(ids, docs, positions, config.prefix_ids,
                                                       earliest=config.positions == "learned_2d")
        def limits(window: int | None = None) -> Tensor | Bounds:
            if use_triton(self.embed_tokens.weight) and config.head_dim <= 256 and not config.alibi_rounded:
                slopes = alibi_slopes(config.num_heads, config.alibi_max) if config.positions == "alibi" else None
                return bounds(docs, T, slopes, context, window)
            return attention_bias(config, docs, T, positions, dtype, context, window)

        full = None if plain else limits()
        local = full
        if config.window is not None and S > config.window:                    # shorter texts do not notice the window
            local = limits(config.window)
        positions, blocks, ropes = positions[:, -T:], blocks if blocks is None else blocks[:, -T:], (None, None)
        if config.positions.startswith("rope"):
            ropes = (rope_tables(config, positions, dtype, blocks if config.positions == "rope_2d" else None),) * 2
            if config.rope_theta_local:
                ropes = ropes[0], rope_tables(config, positions, dtype, local=True)
        return Layout(positions, blocks, (full, local), ropes)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask as drawn at the top of the file -> (B, T, V) logits."""
        return self.lm_head(self.hidden(ids, mask))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, eos_ids: Iterable[int] = (),
                 generator: torch.Generator | None = None, pad_id: int = 0,
                 on_token: Callable[[Tensor], None] | None = None, logprobs: list[Tensor] | None = None,
                 graph: bool = False) -> Tensor:
        """(B, P) prompts, padded on either side -> (B, n) new tokens, n <= max_new_tokens; 0.0 = greedy; a row keeps
        its end token and is filled with pad_id behind it. on_token((B,) ids) is called after every step; a list given
        as logprobs receives one (B,) tensor a step: the log-probability with which each token was drawn. graph: the
        same but for rounding in steps of one shape, which a GPU replays from a CUDA graph."""
        one_adapter(self)
        ids, mask = left_pad(ids, mask)
        room, dtype = ids.shape[1] + max_new_tokens, self.embed_tokens.weight.dtype
        cache = (StaticCache if graph else Cache)(self.config, len(ids), room, ids.device, dtype)
        scaling = self.config.rope_scaling or {}
        trained = scaling.get("original_max_position_embeddings") or self.config.max_positions
        switches = scaling.get("rope_type") == "longrope"

        def following(new: Tensor, mask: Tensor | None = None) -> Tensor:      # (B, T) ids -> (B, V), of the next token
            n = cache.length
            if switches and n and int((cache.docs > 0).sum(1).max()) == trained:
                # From here on RoPE has the divisors of long texts: the keys in the cache were turned by the others.
                new, mask = torch.cat((cache.ids[:, :n], new), dim=1), F.pad(cache.docs[:, :n], (0, 1), value=1)
                cache.length = 0
            return self.lm_head(self.hidden(new, mask, cache)[:, -1])

        def ahead(n: int) -> Layout:                       # of the next n tokens, whatever they will be
            layout = self.layout(ids.new_full((len(ids), n), -1), None, cache)
            return layout._replace(biases=cache.reserve(layout.biases, n))

        def step(new: Tensor, layout: Layout) -> Tensor:                       # (B,), one token's -> (B, V)
            h = self.through(new[:, None], layout, cache)
            cache.at.add_(1)
            return self.lm_head(h[:, -1])

        if graph:
            cache.check(scaling.get("rope_type", "default"), trained, int(mask.sum(1).max()), max_new_tokens)
        settings = (max_new_tokens, temperature, top_k, top_p, eos_ids, generator, pad_id, on_token, logprobs)
        with packed(self) if max_new_tokens >= WORTH_PACKING else contextlib.nullcontext():
            n, distinct, which = shared(ids, mask) if self.reads_in_order() else (0, None, None)
            if n:
                begin = Cache(self.config, len(distinct), n, ids.device, dtype)
                self.hidden(ids[distinct, :n], mask[distinct, :n], begin)
                cache.begin_with(begin, which)
                ids, mask = ids[:, n:], mask[:, n:]
            first = following(ids, None if bool(mask.all()) else mask)
            if graph:
                return decode_static(first, ahead, step, *settings)
            return decode(first, lambda new: following(new[:, None]), cache.keep, *settings)

    def reads_in_order(self) -> bool:
        """May the beginning of a text be read before the rest is known? Not where it sees what follows it, or where
        angles depend on the length. And only on a CPU: on a GPU nobody has measured what it gives."""
        kind = (self.config.rope_scaling or {}).get("rope_type")
        on_cpu = self.embed_tokens.weight.device.type == "cpu"
        return on_cpu and not self.config.prefix_ids and kind not in ("dynamic", "longrope")
