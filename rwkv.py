"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): a language model without attention. Each channel remembers a weighted
mean of the values seen so far, and what it remembers fades by a factor per token.

                sum_{i<t} e^{(t-1-i) w + k_i} v_i  +  e^{u + k_t} v_t
        wkv_t = -----------------------------------------------------        w < 0: fading    u: bonus of the present
                sum_{i<t} e^{(t-1-i) w + k_i}      +  e^{u + k_t}

    for each layer:   x = x + output(sigmoid(r) * wkv(k, v));    x = x + sigmoid(r') * value(relu(key(x'))^2)
    k, v, r read a mix of the token and the one before it ("token shift").

There are two ways to compute the same. The recurrent one goes token by token with a state of fixed size, however long
the text is: generation uses it. The parallel one takes all tokens at once: training uses it. Both add up past and
present with `join`, which carries the largest exponent along, so that no e^k can overflow.

Shapes:  B batch   T tokens   C width   A width of the time mix   L layers   V vocabulary

The mask is that of model.py: 0 = padding, 1 = real, 1, 2, 3, ... = documents packed in a row. A pad leaves the state
and the token shift as they are, on whichever side it stands; a new document begins with an empty state.

    from checkpoints import load; m, t = load("RWKV-4-Pile-169M.pth"); m.generate(ids, 20)
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sampling import decode, left_pad, one_adapter

FAR = 1e30           # tokens of fading after which nothing is left: e^(1e30 w) = 0. Not inf, which times 0 would be NaN
LOWEST = -1e38       # the exponent of nothing. Not -inf, for the same reason


@dataclass
class RWKVConfig:
    vocab_size: int = 50277
    hidden_size: int = 768                 # C
    num_layers: int = 12                   # L
    attention_size: int | None = None      # A, width of the time mix; None: C
    intermediate_size: int | None = None   # width of the channel mix; None: 4 C
    norm_eps: float = 1e-5
    max_positions: int = 1024              # the length it was trained on; the state knows no limit
    tie_embeddings: bool = False

    def __post_init__(self):
        self.attention_size = self.attention_size or self.hidden_size
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size


# ---------------------------------------------------------------- what stands before a token

class Layout(NamedTuple):
    """Where the tokens of a padded or packed row find their past; 0 is the state, 1 the first column, ..."""
    before: Tensor                         # (B, T) the real token before this one
    real: Tensor                           # (B, T) no pad
    start: Tensor                          # (B, T) a document begins that is not the row's first
    last: Tensor                           # (B,) the last real token of the row


def layout(mask: Tensor) -> Layout:
    """mask    0 1 1 2 2 0      a pad, two documents of two tokens, a pad
    before  0 0 2 3 4 5      start  0 0 0 1 0 0      last  5"""
    real = mask > 0
    seen = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * real).cummax(1).values
    before = F.pad(seen[:, :-1], (1, 0))
    start = real & (before > 0) & (mask != F.pad(mask, (1, 0)).gather(1, before))
    return Layout(before, real, start, seen[:, -1])


def shift(x: Tensor, state: Tensor, at: Layout | None) -> tuple[Tensor, Tensor]:
    """(B, T, C), (B, C) what the last call ended with -> the token before each token (B, T, C), the last one (B, C)."""
    if at is None:
        return torch.cat((state[:, None], x[:, :-1]), dim=1), x[:, -1]
    both = torch.cat((state[:, None], x), dim=1)                               # (B, 1 + T, C)
    before = both.gather(1, at.before[..., None].expand_as(x)).masked_fill(at.start[..., None], 0)
    return before, both[torch.arange(len(x), device=x.device), at.last]


# ---------------------------------------------------------------- wkv

Past = tuple[Tensor, Tensor, Tensor, Tensor]   # tokens, and numerator, denominator, both times e^-top, and top


def nothing(shape: tuple[int, ...], device, dtype) -> Past:
    zero = torch.zeros(shape, device=device, dtype=dtype)
    return zero[..., :1], zero, zero, zero + LOWEST


def join(a: Past, b: Past, w: Tensor) -> Past:
    """The sums over a stretch of text and the one behind it: a fades while b is read. The new top is a constant for
    backward: it cancels in numerator / denominator."""
    faded = a[3] + b[0] * w
    top = torch.maximum(faded, b[3]).detach()
    ea, eb = (faded - top).exp(), (b[3] - top).exp()
    return a[0] + b[0], ea * a[1] + eb * b[1], ea * a[2] + eb * b[2], top


def weigh(past: Past, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """The fraction at the top of the file."""
    top = torch.maximum(past[3], k + u).detach()
    e, now = (past[3] - top).exp(), (k + u - top).exp()
    return (e * past[1] + now * v) / (e * past[2] + now)


def tokens(k: Tensor, v: Tensor, at: Layout | None) -> Past:
    """Each token as a text of its own. A pad is no text; a document's first token lets all before it fade."""
    one = torch.ones_like(k[..., :1])
    if at is None:
        return one, v, torch.ones_like(k), k
    real = at.real[..., None].to(k.dtype)
    length = (real * one).masked_fill(at.start[..., None], FAR)
    return length, v * real, torch.ones_like(k) * real, k.masked_fill(real == 0, LOWEST)


def wkv_step(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Past, at: Layout | None) -> tuple[Tensor, ...]:
    """Recurrent form: one token (B, 1, A) and the state before it -> wkv (B, 1, A) and the state after it."""
    past = tuple(x[:, None] for x in past)
    return weigh(past, k, v, u), *(x[:, 0] for x in join(past, tokens(k, v, at), w))


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Past, at: Layout | None) -> tuple[Tensor, ...]:
    """Parallel form: (B, T, A) -> wkv (B, T, A) and the state after it. The text is cut into about sqrt(T) blocks: all
    blocks add up their tokens at the same time, then the sums travel from block to block: 2 sqrt(T) steps, not T."""
    B, T, A = k.shape
    size = math.isqrt(T - 1) + 1
    blocks = -(-T // size)
    texts = tokens(k, v, at)
    fill = [torch.cat((x, y.expand_as(x[:, :1]).repeat(1, blocks * size - T, 1)), dim=1)
            for x, y in zip(texts, nothing((B, 1, A), k.device, k.dtype))]     # pads behind the text
    texts = [x.view(B, blocks, size, -1) for x in fill]

    block, inside = nothing((B, blocks, A), k.device, k.dtype), []
    for i in range(size):
        inside.append(block)                                                   # what token i finds in its block
        block = join(block, tuple(x[:, :, i] for x in texts), w)
    carried = []
    for i in range(blocks):
        carried.append(past)                                                   # what block i finds before it
        past = join(past, tuple(x[:, i] for x in block), w)
    before = join(tuple(torch.stack(x, 1)[:, :, None] for x in zip(*carried)),
                  tuple(torch.stack(x, 2) for x in zip(*inside)), w)           # (B, blocks, size, A)
    *sums, top = (x.flatten(1, 2)[:, :T] for x in before)
    if at is not None:                                                         # a document's first token finds nothing
        top = top.masked_fill(at.start[..., None], LOWEST)
    return weigh((*sums, top), k, v, u), *past


# ---------------------------------------------------------------- the two halves of a layer

def mix(x: Tensor, before: Tensor, share: Tensor) -> Tensor:
    return x * share + before * (1 - share)


class TimeMix(nn.Module):
    def __init__(self, config: RWKVConfig):
        super().__init__()
        C, A = config.hidden_size, config.attention_size
        self.time_decay, self.time_first = nn.Parameter(torch.empty(A)), nn.Parameter(torch.empty(A))
        self.time_mix_key, self.time_mix_value, self.time_mix_receptance = (
            nn.Parameter(torch.empty(1, 1, C)) for _ in range(3))
        self.key, self.value, self.receptance = (nn.Linear(C, A, bias=False) for _ in range(3))
        self.output = nn.Linear(A, C, bias=False)

    def forward(self, x: Tensor, state: tuple, at: Layout | None) -> tuple[Tensor, tuple]:
        before, last = shift(x, state[0], at)
        k = self.key(mix(x, before, self.time_mix_key))                        # (B, T, A)
        v = self.value(mix(x, before, self.time_mix_value))
        r = self.receptance(mix(x, before, self.time_mix_receptance)).sigmoid()
        wide = torch.promote_types(k.dtype, torch.float32)                     # sums over a whole text: never in bf16
        given = (k.to(wide), v.to(wide), -self.time_decay.to(wide).exp(), self.time_first.to(wide), state[1], at)
        if x.shape[1] == 1:
            out, *past = wkv_step(*given)
        elif torch.is_grad_enabled():      # computing the sums again in backward is cheaper than keeping all of them
            out, *past = checkpoint(wkv, *given, use_reentrant=False)
        else:
            out, *past = wkv(*given)
        return self.output(r * out.to(r.dtype)), (last, tuple(past))


class ChannelMix(nn.Module):
    def __init__(self, config: RWKVConfig):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.time_mix_key, self.time_mix_receptance = (nn.Parameter(torch.empty(1, 1, C)) for _ in range(2))
        self.key, self.receptance = nn.Linear(C, I, bias=False), nn.Linear(C, C, bias=False)
        self.value = nn.Linear(I, C, bias=False)

    def forward(self, x: Tensor, state: Tensor, at: Layout | None) -> tuple[Tensor, Tensor]:
        before, last = shift(x, state, at)
        k = self.key(mix(x, before, self.time_mix_key)).relu().square()
        return self.receptance(mix(x, before, self.time_mix_receptance)).sigmoid() * self.value(k), last


class Block(nn.Module):
    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attention, self.feed_forward = TimeMix(config), ChannelMix(config)     # their names in public files

    def forward(self, x: Tensor, state: tuple, at: Layout | None) -> tuple[Tensor, tuple]:
        y, time = self.attention(self.ln1(x), state[0], at)
        x = x + y
        y, channel = self.feed_forward(self.ln2(x), state[1], at)
        return x + y, (time, channel)


# ---------------------------------------------------------------- the model

class State:
    """What the model knows of the text so far: for each layer two tokens (B, C) and the sums of wkv (B, A)."""
    def __init__(self, config: RWKVConfig, batch: int, device, dtype: torch.dtype):
        token = torch.zeros(batch, config.hidden_size, device=device, dtype=dtype)
        past = nothing((batch, config.attention_size), device, torch.promote_types(dtype, torch.float32))
        self.layers = [((token, past), token) for _ in range(config.num_layers)]

    def keep(self, rows: Tensor) -> None:
        self.layers = [((token[rows], tuple(x[rows] for x in past)), other[rows])
                       for (token, past), other in self.layers]


class RWKV(nn.Module):
    fp32 = ("time_decay", "time_first")    # exponents of exponents: stay in fp32 when the rest is bf16

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)       # eps 1e-5 whatever the config says, as in the original
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing, self.recompute_context = False, None               # as in Transformer
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std) for matrices; decays from slow to fast over the channels, more evenly in the lower layers, and
        shares that grow with the channel (appendix of the paper)."""
        for i, layer in enumerate(self.layers):
            depth = i / max(1, len(self.layers) - 1)
            A, C = self.config.attention_size, self.config.hidden_size
            place = torch.arange(A) / max(1, A - 1)
            layer.attention.time_decay.copy_(8 * place ** (0.7 + 1.3 * depth) - 5)
            layer.attention.time_first.copy_(math.log(0.3) + 0.5 * ((torch.arange(A) + 1) % 3 - 1))
            ramp = (torch.arange(C) / C) ** (1 - i / len(self.layers))
            for part in (layer.attention, layer.feed_forward):
                for name, p in part.named_parameters(recurse=False):
                    if name.startswith("time_mix"):
                        p.copy_(ramp + 0.3 * depth if name == "time_mix_value" else ramp)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, ids: Tensor, mask: Tensor | None = None, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm. With a state the ids follow the text that is in it."""
        at = None if mask is None else layout(mask)
        x = self.embed_norm(self.embed_tokens(ids))
        before = state or State(self.config, len(ids), ids.device, x.dtype)
        after = []
        for layer, known in zip(self.layers, before.layers):
            if self.checkpointing and torch.is_grad_enabled():
                context = {"context_fn": self.recompute_context} if self.recompute_context else {}
                x, new = checkpoint(layer, x, known, at, use_reentrant=False, **context)
            else:
                x, new = layer(x, known, at)
            after.append(new)
        if state is not None:
            state.layers = after
        return self.norm(x)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask as at the top of the file -> (B, T, V) logits."""
        return self.lm_head(self.hidden(ids, mask))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, temperature: float = 1.0,
                 **settings) -> Tensor:
        """(B, P) prompts, padded on either side -> (B, n) new tokens; 0.0 = greedy; settings: see sampling.decode."""
        one_adapter(self)
        ids, mask = left_pad(ids, mask)
        state = State(self.config, len(ids), ids.device, self.embed_norm.weight.dtype)

        def following(new: Tensor, mask: Tensor | None = None) -> Tensor:      # (B, T) ids -> (B, V), of the next token
            return self.lm_head(self.hidden(new, mask, state)[:, -1])

        first = following(ids, None if bool(mask.all()) else mask)
        return decode(first, lambda new: following(new[:, None]), state.keep, max_new_tokens, temperature, **settings)
