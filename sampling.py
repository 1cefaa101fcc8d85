"""Drawing tokens: the loop that every model's `generate` shares, and how one token is drawn from logits.

    logits -> / temperature -> the top_k best -> the fewest whose probability reaches top_p -> one of them at random

A model gives `decode` its first logits and two functions: the logits behind a new token, and which rows to go on with.
`Cache` is where an attention keeps the keys and values of what it has read; `shared` finds the beginnings that prompts
have in common, which are read once; `packed` lays the matrices out for a CPU's matrix units.

A step launches hundreds of kernels, and at batch 1 a GPU is done with each before Python has asked for the next.
`decode_static` gives every step the same shapes and addresses, so that a GPU records one and replays it; the random
numbers are the same, and the text too up to rounding. What must be asked of the host happens between rounds of EVERY
tokens:

    round    | lay out 16 tokens | step step step ... step | who has ended? | lay out 16 | step step ...
               positions, masks,   row i of the layout,      one wait for
               RoPE's tables       column `at` of the cache  16 tokens

Shapes:  B batch   V vocabulary   n new tokens
"""
import contextlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from kernels import sample as kernel
from kernels.backend import use_triton


def decode(logits: Tensor, step: Callable[[Tensor], Tensor], keep: Callable[[Tensor], None], max_new_tokens: int,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, eos_ids: Iterable[int] = (),
           generator: torch.Generator | None = None, pad_id: int = 0, on_token: Callable[[Tensor], None] | None = None,
           logprobs: list[Tensor] | None = None, graph: bool = False) -> Tensor:
    """(B, V) logits of the first new token -> (B, n) ids. step((rows,) ids) gives the next logits (rows, V);
    keep((rows,) bool) tells the model to drop the other rows. The rest is documented at Transformer.generate."""
    if graph:
        raise UserError("only the decoders of model.py have steps of one shape: this model samples without --graph")
    B, device = logits.shape[0], logits.device
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    out = torch.full((B, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    rows = torch.arange(B, device=device)                  # the rows still in the cache, by their number in the batch
    alive = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        noise = None if temperature == 0 else torch.rand(B, generator=generator, device=device)[rows]
        new, logp = sample(logits, noise, temperature, top_k, top_p)           # (rows,), (rows,)
        out[rows[alive], t] = new[alive]
        if logprobs is not None:
            logprobs.append(torch.zeros(B, device=device).index_copy(0, rows[alive], logp[alive]))
        if on_token is not None:
            on_token(out[:, t])
        alive = alive & ~torch.isin(new, ends)
        left = int(alive.sum())
        if left == 0:
            return out[:, :t + 1]
        if t + 1 == max_new_tokens:
            break
        if left <= 0.9 * len(alive):                       # dropping rows copies the cache: do it when it pays
            keep(alive)
            rows, new, alive = rows[alive], new[alive], alive[alive]
        logits = step(new)
    return out


class Layout(NamedTuple):
    """Which of (B, T) tokens see which, and where they stand."""
    positions: Tensor                  # (B, T)
    blocks: Tensor | None              # (B, T) GLM's second kind of positions
    biases: tuple                      # of layers that see everything, of those with a window; None: causal, all real
    ropes: tuple                       # cos and sin of the same two kinds, (B, 1, T, D) each; None: nothing turns


EVERY = 16                             # tokens between two looks at which rows have ended


def decode_static(logits: Tensor, ahead: Callable[[int], tuple], step: Callable[[Tensor, tuple], Tensor],
                  max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  eos_ids: Iterable[int] = (), generator: torch.Generator | None = None, pad_id: int = 0,
                  on_token: Callable[[Tensor], None] | None = None, logprobs: list[Tensor] | None = None) -> Tensor:
    """`decode` in steps of one shape. ahead(n) lays out the next n tokens; step((B,) ids, one token's layout) gives
    the next logits (B, V). Rows that ended stay in the batch and cost what the others cost."""
    B, device, n = logits.shape[0], logits.device, 0
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    out = torch.full((B, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    logps, left = torch.zeros(B, max_new_tokens, device=device), torch.ones_like(out[0])
    new, alive = torch.zeros(B, dtype=torch.int64, device=device), torch.ones(B, dtype=torch.bool, device=device)
    t, i = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))        # token, row of the layout
    noise = None if temperature == 0 else torch.empty(B, device=device)
    generator = default_generator(device) if generator is None else generator
    layout: tuple | None = None

    def put(logits: Tensor) -> None:
        token, logp = sample(logits, noise, temperature, top_k, top_p, check=False)
        out.index_copy_(1, t, token.masked_fill(~alive, pad_id)[:, None])
        logps.index_copy_(1, t, logp.masked_fill(~alive, 0.0)[:, None])
        alive.logical_and_((token[:, None] != ends).all(1))
        left.index_copy_(0, t, alive.sum()[None])
        new.copy_(token)
        t.add_(1)

    def follow() -> None:
        put(step(new, each(lambda x: x if x.dim() == 1 else x.index_select(steps(x), i), layout)))
        i.add_(1)

    replay = Replay(follow, device.type == "cuda")
    while n < max_new_tokens:
        stop = min(n + EVERY, max_new_tokens) if n else 1      # the first token comes from the prompt's logits
        if n:
            new_layout = ahead(stop - n)
            layout = each(torch.clone, new_layout) if layout is None else each(refill, layout, new_layout)
            i.zero_()
        states = []                                            # of the generator, after each draw
        for k in range(n, stop):
            if noise is not None:
                noise.uniform_(generator=generator)
                states.append(generator.get_state())
            replay() if k else put(logits)
            if on_token is not None:
                on_token(out[:, k])
                if not bool(left[k]):
                    stop = k + 1
                    break
        check_finite(logps[:, n:stop].sum(1))
        ended = (left[n:stop] == 0).tolist()
        if True in ended:
            stop = n + ended.index(True) + 1
            if states:                                         # who draws next finds what decode would have left
                generator.set_state(states[stop - n - 1])
            n = stop
            break
        n = stop
    if logprobs is not None:
        logprobs.extend(logps[:, :n].unbind(1))
    return out[:, :n]


def default_generator(device: torch.device) -> torch.Generator:
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index] \
        if device.type == "cuda" else torch.default_generator


class Replay:
    """A step on tensors that stay where they are. On a GPU the first call runs it, which also compiles its kernels; the
    second records it as a CUDA graph; from there on it is one launch. The graph lives as long as this object."""
    def __init__(self, step: Callable[[], None], record: bool):
        self.step, self.record, self.calls, self.graph = step, record, 0, None

    def __call__(self) -> None:
        self.calls += 1
        if not self.record or self.calls == 1:
            self.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):      # records, computes nothing
                self.step()
        self.graph.replay()


def each(function: Callable, first, *others):
    """function of every tensor of a nest of tuples; what is no tensor stays as it is in the first."""
    if isinstance(first, Tensor):
        return function(first, *others)
    if not isinstance(first, tuple):
        return first
    parts = [each(function, *parts) for parts in zip(first, *others)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def steps(x: Tensor) -> int:
    """The dimension of a layout's tensor that counts tokens: (B, T), (B, H, T, S), (B, 1, T, D)."""
    return 1 if x.dim() == 2 else 2


def refill(old: Tensor, new: Tensor) -> Tensor:
    """The layout of the next round in the memory of the first one's; the last round may be shorter."""
    if old.dim() > 1:                                          # ALiBi's slopes (H,) never change
        old.narrow(steps(old), 0, new.shape[steps(new)]).copy_(new)
    return old


class Cache:
    """Keys and values of the tokens seen so far, allocated once: k, v (layers, B, K, S, D); their mask, ids (B, S)."""
    def __init__(self, config, batch: int, size: int, device, dtype):
        shape = (config.num_layers, batch, config.num_kv_heads, size, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.docs, self.ids = (torch.zeros(batch, size, dtype=torch.int64, device=device) for _ in range(2))
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, D) behind the tokens seen so far and returns all of them (B, K, S + T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def begin_with(self, other: "Cache", rows: Tensor) -> None:
        """Each row has read what that row (B,) of the other cache has read."""
        n = self.length = other.length
        self.k[:, :, :, :n], self.v[:, :, :, :n] = other.k[:, rows, :, :n], other.v[:, rows, :, :n]
        self.docs[:, :n], self.ids[:, :n] = other.docs[rows, :n], other.ids[rows, :n]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only: a row that has ended must not cost anything any more."""
        self.k, self.v, self.docs, self.ids = self.k[:, rows], self.v[:, rows], self.docs[rows], self.ids[rows]


class StaticCache(Cache):
    """A cache for steps of one shape: behind the prompt a token goes to column `at`, a number on the device, and all
    columns come back, the unwritten ones as zeros that no mask lets through. `length` counts what is laid out."""
    at: Tensor | None = None           # None: the prompt is being read

    def check(self, rope_type: str, trained: int, longest: int, new: int) -> None:
        """Frequencies that change while a text grows have no step that serves every length."""
        moving = rope_type == "dynamic" or (rope_type == "longrope" and longest <= trained)
        if moving and longest + new > trained:
            raise UserError(f"{longest} tokens and {new} new ones cross the {trained} this model was trained on, where "
                            f"its RoPE ({rope_type}) changes: sample without --graph, or fewer tokens")

    def reserve(self, biases: tuple, n: int) -> tuple:
        """The next n columns are laid out; their masks, made for the columns so far, become those of all columns."""
        if self.at is None:
            self.at = torch.full((1,), self.length, dtype=torch.int64, device=self.k.device)
        self.length += n
        return tuple(F.pad(bias, (0, self.k.shape[3] - bias.shape[-1]), value=-math.inf) if isinstance(bias, Tensor)
                     else bias.for_decoding() for bias in biases)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.at is None:
            return super().append(layer, k, v)
        self.k[layer].index_copy_(2, self.at, k)
        self.v[layer].index_copy_(2, self.at, v)
        return self.k[layer], self.v[layer]


def left_pad(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Moves the padding of each row to its left, so that the last column holds the last real token of every row.
    ids [[5, 6, 0], [7, 8, 9]], mask [[1, 1, 0], [1, 1, 1]] -> [[0, 5, 6], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]]"""
    if mask is None:
        return ids, torch.ones_like(ids)
    assert bool((mask > 0).any(1).all()), "a row of the batch has no real token: generate needs at least one per prompt"
    order = (mask > 0).long().argsort(dim=1, stable=True)      # pads first, real tokens keep their order
    return ids.gather(1, order), (mask > 0).long().gather(1, order)


def shared(ids: Tensor, mask: Tensor) -> tuple[int, Tensor, Tensor]:
    """Left-padded prompts (B, P) -> how many columns n to read of the distinct beginnings only, which row has each of
    them (U,), and which of them each row has (B,). n is where U n + B (P - n) tokens are fewest, and below P.
    ids [[0, 5, 6, 7], [0, 5, 6, 8], [5, 6, 9, 9]], two pads -> 3, rows [1, 2], [0, 0, 1] : 9 tokens instead of 12
    No column moves: shifted sums would round differently from those that score the finished text."""
    B, P = ids.shape
    rows, place = torch.where(mask > 0, ids, -1).unique(dim=0, return_inverse=True)            # sorted as words are
    common = (rows[1:] == rows[:-1]).long().cumprod(1).sum(1)                  # with the row above: (U - 1,) columns
    n = torch.arange(P, device=ids.device)
    distinct = 1 + (common[:, None] < n).sum(0)                                # beginnings of n columns (P,)
    best = int((distinct * n + B * (P - n)).argmin())
    which = F.pad((common < best).long().cumsum(0), (1, 0))[place]
    first = which.new_zeros(int(distinct[best]))
    first[which] = torch.arange(B, device=ids.device)
    return best, first, which


def one_adapter(model: nn.Module) -> None:
    """Adapters that share a batch have their places in it, and a row that has ended leaves it."""
    if any(len(m.switch.active) > 1 for m in model.modules() if hasattr(m, "switch")):
        raise UserError("sampling needs one adapter for all rows: rows that have ended leave the batch")


LARGEST = 10**9                            # weights of which `packed` makes a copy


def can_pack() -> bool:
    """Whether this CPU's library takes packed matrices of bf16: on x86 it wants AVX-512, and fails without."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def packed(model: nn.Module):
    """The same bits in two thirds of the time, for a bf16 model on a CPU: each matrix is laid out once as the matrix
    units read it, where an ordinary product does it anew every time. Costs a copy of the weights while it lasts."""
    linears = [m for m in model.modules() if type(m) is nn.Linear or hasattr(m, "pack")]
    linears = [m for m in linears if "forward" not in vars(m)]                 # not packed by a block around this one
    fits = can_pack() and sum(m.weight.numel() for m in linears) <= LARGEST
    if not fits or any(m.weight.device.type != "cpu" or m.weight.dtype != torch.bfloat16 for m in linears):
        linears = []
    try:
        with torch.no_grad():
            for m in linears:
                m.forward = m.pack() if hasattr(m, "pack") else pack(m.weight, m.bias)
        yield model
    finally:
        for m in linears:
            vars(m).pop("forward", None)               # the one of its class again


def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with this weight, for good."""
    matrix = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


def sample(logits: Tensor, noise: Tensor | None, temperature: float, top_k: int | None = None,
           top_p: float | None = None, check: bool = True) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniform noise -> (B,) ids and their log-probabilities, by inverting the cumulative
    distribution: a row's draw depends on its own noise only, so it gives the same text whoever else is in the batch.
    noise None = greedy. check=False leaves it to the caller to look for numbers that are not finite."""
    logits = logits.float()
    if noise is None:
        best = logits.max(-1)
        check and check_finite(best.values)
        return best.indices, best.values - logits.logsumexp(-1)
    if use_triton(logits):             # by thresholds instead of a sort, see there
        new, logp = kernel.sample(logits, noise, temperature, top_k, top_p)
        check and check_finite(logp)
        return new, logp
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
    check and check_finite(total)
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
