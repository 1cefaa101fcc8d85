"""torch.compile sees one graph where there is one: models, losses and PPO's formulas, traced and run by the compiler's
front end alone (backend "eager": no code is made). What selects tokens by a mask has a shape that depends on data and
breaks the graph there: sft.batch_loss and the log-probabilities of PPO, outside the model."""
import pytest
import torch
from conftest import assert_close, random_ids, tiny_model

import lora
import ppo
from kernels import backend, nf4

MODELS = {"llama": {}, "bloom": {"positions": "alibi", "norm": "layer", "glu": False},
          "gpt-2": {"positions": "learned", "norm": "layer", "glu": False},
          "gemma": {"attention_softcap": 5.0, "final_softcap": 8.0, "window": 6, "full_layers": (1,),
                    "embed_scale": 7.0, "rope_theta_local": 100.0},
          "chatglm": {"positions": "rope_2d", "prefix_ids": (90, 91), "num_kv_heads": 4}}
IDS = random_ids(2, 24)
MASK = torch.tensor([[0] * 5 + [1] * 19, [1] * 24])


def one_graph(function, *inputs):
    """The outputs of the traced function; a break in the graph is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")(*inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph(name):
    model = tiny_model(**MODELS[name])
    for mask in (None, MASK):
        assert_close(one_graph(model, IDS, mask), model(IDS, mask), 1e-6)


def test_adapters_and_four_bits_too_with_their_gradients():
    model = tiny_model()
    for path, m in list(model.named_modules()):
        if isinstance(m, torch.nn.Linear) and "mlp" in path:
            model.set_submodule(path, nf4.QuantisedLinear(nf4.quantise(m.weight)))
    lora.apply(model, 4, 8.0, name="a")
    for _, p in lora.parameters(model, "a"):
        torch.nn.init.normal_(p, std=0.1)
    grads = []
    with lora.use(model, "a"):
        for call in (lambda: one_graph(model, IDS, MASK), lambda: model(IDS, MASK)):
            params = [p for _, p in lora.parameters(model, "a")]
            grads.append(torch.autograd.grad(call().square().mean(), params))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-5)


def test_the_formulas_of_ppo_are_one_graph():
    x, y, z = (torch.randn(2, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    logits = tiny_model()(IDS).detach()
    for function, inputs in ((ppo.logprobs, (logits, IDS)), (ppo.kl, (x, y)), (ppo.gae, (x, y, MASK)),
                             (ppo.whiten, (x, MASK)), (lambda *a: ppo.policy_loss(*a)[0], (x, y, z, MASK)),
                             (lambda *a: ppo.value_loss(*a)[0], (x, y, z, MASK))):
        expected, got = function(*inputs), one_graph(function, *inputs)
        for a, b in zip(got, expected) if isinstance(got, tuple) else ((got, expected),):
            assert_close(a, b, 1e-6)


def test_questions_to_the_card_are_constants():
    """The compiler cannot look into them: it must take their answer."""
    asked = []

    @backend.constant
    def question(device: int) -> tuple[int, int]:
        asked.append(open(__file__, encoding="utf-8").read(1))         # nothing that could be traced
        return 9, device
    assert one_graph(lambda x: x + 1 if question(0) >= (8, 0) else x, torch.zeros(1)) == 1
    assert question(0) == (9, 0) and len(asked) == 1                   # and asked once
    assert backend.capability._dynamo_marked_constant and backend.processors._dynamo_marked_constant
