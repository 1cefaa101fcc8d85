"""One loop for every model that writes token by token, whatever it carries from token to token.

    logits of the prompt -> draw a token for every row -> logits after it -> ... until all rows have ended

A model brings two functions: `step` takes the new tokens and gives the logits of what follows, `keep` drops the rows
that have ended from its cache or state. Nothing here knows whether that is keys and values or a recurrent state.
"""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model import sample


@torch.no_grad()
def decode(step: Callable[[Tensor | None], Tensor], keep: Callable[[Tensor], None], batch: int, max_new_tokens: int,
           device: torch.device, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           eos_ids: Iterable[int] = (), generator: torch.Generator | None = None, pad_id: int = 0,
           on_token: Callable[[Tensor], None] | None = None, logprobs: list[Tensor] | None = None) -> Tensor:
    """-> (B, n) new tokens, n <= max_new_tokens. step(None) gives the logits (B, V) behind the prompt, step(new) those
    behind the tokens new (rows,); keep(alive) drops rows. The settings are those of Transformer.generate."""
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    out = torch.full((batch, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    rows = torch.arange(batch, device=device)              # the rows still in the cache, by their number in the batch
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    new = None
    for t in range(max_new_tokens):
        logits = step(new)                                                     # (rows, V)
        # A number for every row of the batch, ended or not: a row's text does not depend on when the others end.
        noise = None if temperature == 0 else torch.rand(batch, generator=generator, device=device)[rows]
        new, logp = sample(logits, noise, temperature, top_k, top_p)           # (rows,), (rows,)
        out[rows[alive], t] = new[alive]
        if logprobs is not None:
            logprobs.append(torch.zeros(batch, device=device).index_copy(0, rows[alive], logp[alive]))
        if on_token is not None:
            on_token(out[:, t])
        alive = alive & ~torch.isin(new, ends)
        left = int(alive.sum())
        if left == 0:
            return out[:, :t + 1]
        if left <= 0.9 * len(alive):                       # dropping rows copies the cache: do it when it pays
            keep(alive)
            rows, new, alive = rows[alive], new[alive], alive[alive]
    return out
