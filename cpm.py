"""CPM-Ant+ (OpenBMB 2022): a Chinese language model that reads in both directions, behind learned prompt tokens.

    [p_1 ... p_32] x_1 ... x_T      32 prompt vectors in front of every text; each token has its kind ("segment") added
    for each layer:   x = x + attention(norm(x));   x = x + down(gelu(gate(norm(x))) * up(norm(x)))

Positions are a bias on the scores, shared by all layers. Within a segment it goes by the bucket of the distance, as in
T5; between two segments by their pair alone: one number for "a word looks at the prompt", another for the way back.
All given tokens see each other (`model(ids, mask)`); in `generate` a new token sees what stands before it, and nothing
that was computed before sees the new token, so that a cache holds.

Shapes:  B batch   T tokens   P prompt tokens   C width   H heads   D head dim   V vocabulary

    from checkpoints import load; m, t = load("cpm-ant-10b"); m.generate(ids, 20)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import Cache, RMSNorm
from sampling import decode, left_pad, one_adapter
from t5 import bucket, check_buckets, hide

PROMPT, TEXT = 0, 2                        # segments, as in the published model
PROMPT_TYPE = 2                            # of the prompts that were trained, the one for writing on


@dataclass
class CPMConfig:
    vocab_size: int = 30720
    hidden_size: int = 4096                # C
    intermediate_size: int = 10240
    num_layers: int = 48
    num_heads: int = 32                    # H
    head_dim: int = 128                    # D
    num_buckets: int = 512                 # of distances
    max_distance: int = 2048               # from here on all distances share one bucket
    max_positions: int = 2048              # the length it was trained on; nothing ends there
    prompt_length: int = 32                # P
    prompt_types: int = 32
    segment_types: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.num_kv_heads = self.num_heads                                     # what Cache asks for
        check_buckets(self.num_buckets // 2, self.max_distance)


class Block(nn.Module):
    def __init__(self, config: CPMConfig):
        super().__init__()
        C, I, inner = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim  # noqa: E741
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(C, config.norm_eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(inner, C, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(C, I, bias=False), nn.Linear(C, I, bias=False)
        self.down_proj = nn.Linear(I, C, bias=False)
        self.head_dim = config.head_dim

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None, layer: int) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, H, T, D)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + bias       # (B, H, T, S)
        out = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.gelu(self.gate_proj(h)) * self.up_proj(h))


class CPM(nn.Module):
    bidirectional = True                   # all given tokens see each other: next-token training would see the answers

    def __init__(self, config: CPMConfig):
        super().__init__()
        self.config = config
        C, S = config.hidden_size, config.segment_types
        # The prompts are the last rows of the embedding.
        self.embed_tokens = nn.Embedding(config.vocab_size + config.prompt_types * config.prompt_length, C)
        self.embed_segments = nn.Embedding(S, C)
        self.position_bias = nn.Parameter(torch.empty(S * S + config.num_buckets, config.num_heads))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(C, config.norm_eps)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.checkpointing, self.recompute_context = False, None               # as in Transformer
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std)

    def bias(self, segments: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
        """(B, S) segments of all keys -> what is added to the scores of the last T queries, (B, H, T, S)."""
        S = segments.shape[1]
        index = torch.arange(S, device=segments.device)
        ask, there = segments[:, S - queries:, None], segments[:, None]        # (B, T, 1), (B, 1, S)
        near = bucket(index - index[S - queries:, None], self.config.num_buckets, self.config.max_distance, True)
        pair = self.config.num_buckets + ask * self.config.segment_types + there
        row = torch.where(ask == there, near, pair)                            # (B, T, S), of the table
        return F.embedding(row, self.position_bias).permute(0, 3, 1, 2).to(dtype)

    def hidden(self, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm, for the tokens without the prompt. Tokens that are given at
        once see each other; with a cache the ids follow what is in it."""
        first, P = cache is None or cache.length == 0, self.config.prompt_length
        mask = torch.ones_like(ids) if mask is None else (mask > 0).long()
        if first:
            start = self.config.vocab_size + PROMPT_TYPE * P
            prompt = torch.arange(start, start + P, device=ids.device).expand(len(ids), P)
            ids, mask = torch.cat((prompt, ids), dim=1), F.pad(mask, (P, 0), value=1)
        T, docs = ids.shape[1], mask
        if cache is not None:
            cache.docs[:, cache.length:cache.length + T] = mask
            docs = cache.docs[:, :cache.length + T]
        segments = torch.where(torch.arange(docs.shape[1], device=ids.device) < P, PROMPT, TEXT).expand_as(docs)
        x = self.embed_tokens(ids) + self.embed_segments(segments[:, -T:])
        bias = hide(self.bias(segments, T, x.dtype), (docs > 0)[:, None, None])
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                context = {"context_fn": self.recompute_context} if self.recompute_context else {}
                x = checkpoint(layer, x, bias, cache, i, use_reentrant=False, **context)
            else:
                x = layer(x, bias, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x[:, P:] if first else x)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask 1 = real token, padding on either side -> (B, T, V) logits."""
        return self.lm_head(self.hidden(ids, mask))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, temperature: float = 1.0,
                 **settings) -> Tensor:
        """(B, T) prompts, padded on either side -> (B, n) new tokens; 0.0 = greedy; settings: see sampling.decode."""
        one_adapter(self)
        ids, mask = left_pad(ids, mask)
        size = self.config.prompt_length + ids.shape[1] + max_new_tokens
        cache = Cache(self.config, len(ids), size, ids.device, self.embed_tokens.weight.dtype)

        def following(new: Tensor, mask: Tensor | None = None) -> Tensor:      # (B, T) ids -> (B, V), of the next token
            return self.lm_head(self.hidden(new, mask, cache)[:, -1])

        return decode(following(ids, mask), lambda new: following(new[:, None]), cache.keep, max_new_tokens,
                      temperature, **settings)
