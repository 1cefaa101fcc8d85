"""T5 (Raffel et al. 2020, arXiv 1910.10683): an encoder reads the prompt in both directions, a decoder writes the
answer. T5 v1.0 and v1.1, mT5, and what was tuned from them: ChatYuan, PromptCLUE, Flan.

    encoder layer   x = x + attention(norm(x));   x = x + mlp(norm(x))
    decoder layer   x = x + attention(norm(x));   x = x + cross_attention(norm(x), encoder);   x = x + mlp(norm(x))

What differs from model.py's decoder: positions are a learned bias on the scores, one number for each head and each
bucket of distances, the same table in all layers of a stack; the scores are not divided by sqrt(D), initialisation
took care of it; v1.0 multiplies what the head reads by C^-0.5, because its head is the embedding.

Shapes:  B batch   S prompt tokens   T answer tokens   C width   H heads   D head dim   V vocabulary

    from checkpoints import load; m, t = load("chatyuan"); m.generate(ids, 20)      # ids: the prompt; out: the answer
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import ACTIVATIONS, Cache, RMSNorm
from sampling import decode, left_pad, one_adapter


@dataclass
class T5Config:
    vocab_size: int = 32128
    hidden_size: int = 512                 # C
    intermediate_size: int = 2048
    num_layers: int = 6                    # of the encoder
    num_decoder_layers: int | None = None  # None: as many
    num_heads: int = 8                     # H
    head_dim: int = 64                     # D; H * D need not be C
    num_buckets: int = 32                  # of distances
    max_distance: int = 128                # from here on all distances share one bucket
    max_positions: int = 512               # the length it was trained on; nothing ends there
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False                    # v1.1: act(gate(x)) * up(x)
    scale_output: bool = True              # v1.0: the head reads x * C^-0.5
    tie_embeddings: bool = True
    decoder_start_id: int = 0              # the decoder's first input

    def __post_init__(self):
        self.num_decoder_layers = self.num_decoder_layers or self.num_layers
        self.num_kv_heads = self.num_heads                                     # what Cache asks for
        check_buckets(self.num_buckets // 2, self.max_distance)


# ---------------------------------------------------------------- positions

def check_buckets(buckets: int, max_distance: int) -> None:
    """Of one direction: half of them must be left for the logarithm, and it must have a way to go."""
    if buckets < 2 or max_distance <= buckets:
        raise ValueError(f"{buckets} buckets for each direction up to a distance of {max_distance}: at least 2, and "
                         "the distance must be larger")


def bucket(distance: Tensor, num_buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """Key position - query position -> number of its bucket. Half of the buckets are single distances, the other half
    grows logarithmically up to max_distance. both_ways: the upper half of all buckets is for keys behind the query.
    8 buckets up to 16, one way: distance 0 -1 -2 -3 -4 -5 -6 -8 -16 -> 0 1 2 3 4 4 5 6 7, and all keys behind 0"""
    n = num_buckets // 2 if both_ways else num_buckets
    side = n * (distance > 0).long() if both_ways else 0
    far = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = n // 2
    share = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)       # 0 at exact, 1 at max
    return side + torch.where(far < exact, far, (exact + (share * (n - exact)).long()).clamp(max=n - 1))


class PositionBias(nn.Embedding):
    """The table (buckets, H) of one stack. forward: the bias (1, H, T, S) for T queries, the last of S keys."""
    def __init__(self, config: T5Config, both_ways: bool):
        super().__init__(config.num_buckets, config.num_heads)
        self.settings = (config.num_buckets, config.max_distance, both_ways)

    def forward(self, T: int, S: int) -> Tensor:
        key = torch.arange(S, device=self.weight.device)
        number = bucket(key - key[S - T:, None], *self.settings)               # (T, S)
        return super().forward(number).permute(2, 0, 1)[None]


def hide(bias: Tensor, see: Tensor) -> Tensor:
    """The bias where a token may look, a huge negative number elsewhere. Not -inf: a pad that sees nothing would be
    NaN; so it sees everything, and nobody looks at it."""
    return bias.masked_fill(~see, torch.finfo(bias.dtype).min)


# ---------------------------------------------------------------- layers

class Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        C, inner = config.hidden_size, config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(inner, C, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, T, H * D) -> (B, H, T, D)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))          # (B, H, S, D) each

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """softmax(q k^T + bias) v: nothing is divided by sqrt(D)."""
        k, v = keys
        scores = self.split(self.q_proj(x)) @ k.transpose(2, 3) + bias         # (B, H, T, S)
        out = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(relu(up(x))), or gated: down(gelu(gate(x)) * up(x))."""
    def __init__(self, config: T5Config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        if config.gated:
            self.gate_proj = nn.Linear(C, I, bias=False)
        self.up_proj, self.down_proj = nn.Linear(C, I, bias=False), nn.Linear(I, C, bias=False)
        self.gated, self.act = config.gated, ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act(self.up_proj(x))
        return self.down_proj(h)


class Block(nn.Module):
    """A layer of either stack; only a decoder's has cross-attention."""
    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        if decoder:
            self.cross_attn_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
            self.cross_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, bias: Tensor, source: tuple[Tensor, Tensor] | None = None,
                cross_bias: Tensor | None = None, append: Callable | None = None) -> Tensor:
        """source: keys and values of the encoder's output; append: puts keys and values behind those of the cache."""
        h = self.input_layernorm(x)
        keys = self.self_attn.keys(h)
        x = x + self.self_attn(h, append(*keys) if append else keys, bias)
        if source is not None:
            x = x + self.cross_attn(self.cross_attn_layernorm(x), source, cross_bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        self.position_bias = PositionBias(config, both_ways=not decoder)
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.layers = nn.ModuleList(Block(config, decoder) for _ in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


# ---------------------------------------------------------------- the model

class Memory:
    """What decoding keeps: the decoder's own keys and values, those of the prompt for each layer, who may be seen."""
    def __init__(self, model: "T5", ids: Tensor, mask: Tensor, size: int):
        source = model.encode(ids, mask)
        config = replace(model.config, num_layers=model.config.num_decoder_layers)
        self.cache = Cache(config, len(ids), size, ids.device, source.dtype)
        self.source = [layer.cross_attn.keys(source) for layer in model.decoder.layers]
        self.mask = mask

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.source, self.mask = [(k[rows], v[rows]) for k, v in self.source], self.mask[rows]


class T5(nn.Module):
    encoder_decoder = True

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.decoder = Stack(config, decoder=False), Stack(config, decoder=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing, self.recompute_context = False, None               # as in Transformer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices N(0, 1 / width of their input), q smaller by sqrt(D): it stands in for the missing 1 / sqrt(D)."""
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:
                std = 1.0 if name == "embed_tokens.weight" else p.shape[1] ** -0.5
                std = self.config.hidden_size ** -0.5 if "position_bias" in name else std
                nn.init.normal_(p, std=std * self.config.head_dim ** -0.5 if "q_proj" in name else std)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def run(self, layer: Block, *inputs) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layer(*inputs)
        context = {"context_fn": self.recompute_context} if self.recompute_context else {}
        return checkpoint(layer, *inputs, use_reentrant=False, **context)

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S) prompts, padded on either side -> (B, S, C) what the decoder looks at."""
        x = self.embed_tokens(ids)
        bias = self.encoder.position_bias(ids.shape[1], ids.shape[1]).to(x.dtype)
        if mask is not None:
            bias = hide(bias, (mask > 0)[:, None, None])                       # (B, H, S, S)
        for layer in self.encoder.layers:
            x = self.run(layer, x, bias)
        return self.encoder.norm(x)

    def hidden(self, ids: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None,
               decoder_mask: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """(B, S) prompts, (B, T) decoder inputs -> (B, T, C), what the head reads. No decoder_ids: the start token
        alone. With a memory the ids are in it, and decoder_ids follow the tokens that are in it."""
        if decoder_ids is None:
            decoder_ids = torch.full_like(ids[:, :1], self.config.decoder_start_id)
        source = self.encode(ids, mask) if memory is None else None
        mask = mask if memory is None else memory.mask
        x = self.embed_tokens(decoder_ids)
        past, T = (0 if memory is None else memory.cache.length), decoder_ids.shape[1]
        seen = torch.ones_like(decoder_ids) if decoder_mask is None else (decoder_mask > 0).long()
        if memory is not None:
            memory.cache.docs[:, past:past + T] = seen
            seen = memory.cache.docs[:, :past + T]
        causal = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
        bias = hide(self.decoder.position_bias(T, past + T).to(x.dtype), causal & (seen > 0)[:, None, None])
        cross = x.new_zeros(1, 1, 1, 1) if mask is None else hide(x.new_zeros(1, 1, 1, 1), (mask > 0)[:, None, None])
        for i, layer in enumerate(self.decoder.layers):
            if memory is None:
                x = self.run(layer, x, bias, layer.cross_attn.keys(source), cross)
            else:
                x = layer(x, bias, memory.source[i], cross, lambda k, v, i=i: memory.cache.append(i, k, v))
        if memory is not None:
            memory.cache.length += T
        x = self.decoder.norm(x)
        return x * self.config.hidden_size ** -0.5 if self.config.scale_output else x

    def forward(self, ids: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None,
                decoder_mask: Tensor | None = None) -> Tensor:
        """(B, S) prompts, mask 1 = real token, (B, T) decoder inputs -> (B, T, V) logits of the decoder."""
        return self.lm_head(self.hidden(ids, mask, decoder_ids, decoder_mask))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, temperature: float = 1.0,
                 decoder_ids: Tensor | None = None, **settings) -> Tensor:
        """(B, S) prompts, padded on either side -> (B, n) new tokens behind decoder_ids (B, T), the beginning of the
        answer: the start token if nothing else is given. 0.0 = greedy; settings: see sampling.decode."""
        one_adapter(self)
        ids, mask = left_pad(ids, mask)                    # only so that a row without tokens is the same error as ever
        if decoder_ids is None:
            decoder_ids = torch.full_like(ids[:, :1], self.config.decoder_start_id)
        memory = Memory(self, ids, mask, decoder_ids.shape[1] + max_new_tokens)

        def following(new: Tensor) -> Tensor:                                  # (B, T) ids -> (B, V), of the next token
            return self.lm_head(self.hidden(ids, None, new, memory=memory)[:, -1])

        return decode(following(decoder_ids), lambda new: following(new[:, None]), memory.keep, max_new_tokens,
                      temperature, **settings)

