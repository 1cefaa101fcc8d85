"""generate.py: the loop that RWKV, T5 and CPM share draws what Transformer.generate draws, number for number."""
import pytest
import torch
from conftest import random_ids, tiny_model

from generate import decode
from model import Cache, left_pad


def through(model, ids, n, mask=None, **settings):
    """Transformer by way of decode: its cache in place of a state."""
    ids, mask = left_pad(ids, mask)
    cache = Cache(model.config, len(ids), ids.shape[1] + n, ids.device, torch.float32)

    @torch.no_grad()
    def step(new):
        h = model.hidden(ids, mask, cache) if new is None else model.hidden(new[:, None], None, cache)
        return model.lm_head(h[:, -1])
    return decode(step, cache.keep, len(ids), n, ids.device, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("n", [0, 1, 14])
def test_the_same_tokens_probabilities_and_calls_as_transformer_generate(settings, n):
    model, ids = tiny_model(), random_ids(6, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[4, 5:] = 0
    ends = model.generate(ids, 14, mask, 0.0)[:3, 4].tolist()                # ends that really come
    results = []
    for work in (model.generate, lambda *args, **more: through(model, *args, **more)):
        calls, logps = [], []
        new = work(ids, n, mask=mask, eos_ids=ends, pad_id=96, generator=torch.Generator().manual_seed(3),
                   on_token=lambda t, calls=calls: calls.append(t.tolist()), logprobs=logps, **settings)
        results.append((new.tolist(), calls, [x.tolist() for x in logps]))
    assert results[0] == results[1]
    if n == 14 and settings.get("temperature") == 0.0:
        assert any(96 in row for row in results[0][0]), "no row ended: the example tests too little"
