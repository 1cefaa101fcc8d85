"""rwkv.py against transformers, against the paper's formula summed by hand, and against itself: the recurrent form, the
parallel form, padded and packed rows must all say the same.

transformers 5.23 is asked one row at a time and without its cache, which broadcasts wrongly for several rows; its
final norm has eps 1e-5 whatever the config says, and so has ours.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_close, byte_tokenizer, edit_saved, error, random_ids
from test_memory import peak_bytes
from test_scripts import TINY, figure, run, write_rows
from torch import Tensor, nn

import checkpoints
import lora
import memory
import rwkv
import sft
from checkpoints import layouts
from common import UserError
from data import batch as data_batch
from data import tokenizer as tokenizers
from rwkv import RWKV, RWKVConfig, State

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "parity" / "rwkv" / "4-blinkdl-pth"
SIZES = {"vocab_size": 97, "hidden_size": 48, "num_layers": 3, "attention_size": 40, "intermediate_size": 80,
         "norm_eps": 1e-5}


def scatter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights whose parts all matter: fast and slow decays, shares between 0 and 1, logits of size 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "time_mix" in name:
                p.copy_(torch.rand(p.shape, generator=generator))
            elif name.endswith(("time_decay", "time_first")):
                p.copy_(noise - 1 if "decay" in name else noise)
            else:
                p.copy_(1 + 0.2 * noise if p.dim() == 1 and "weight" in name else 0.3 * noise)
    return model.eval()


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> RWKV:
    return scatter(RWKV(RWKVConfig(**{**SIZES, **changes})), seed).to(dtype)


def theirs(folder: Path, seed: int = 0, **changes):
    """transformers' model with random weights, and the directory it wrote."""
    from transformers import RwkvConfig as HFConfig
    from transformers import RwkvForCausalLM
    config = HFConfig(**{"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "attention_hidden_size": 40,
                         "intermediate_size": 80, "rescale_every": 0, "context_length": 64, **changes})
    model = scatter(RwkvForCausalLM(config), seed)
    model.save_pretrained(folder)
    return model


def ask(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(row[None], use_cache=False).logits for row in ids])


def by_hand(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The paper's sums, each written out: (T, A)."""
    out = []
    for t in range(len(k)):
        weights = [((t - 1 - i) * w + k[i]).exp() for i in range(t)] + [(u + k[t]).exp()]
        out.append(sum(e * x for e, x in zip(weights, v[:t + 1])) / sum(weights))
    return torch.stack(out)


def wkv_inputs(B: int, T: int, A: int = 5, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, T, A, generator=generator, dtype=torch.float64)
    w, u = torch.randn(2, A, generator=generator, dtype=torch.float64)
    return 2 * k, v, -w.exp(), u


# ---------------------------------------------------------------- the formula

@pytest.mark.parametrize("T", [2, 3, 4, 5, 9, 10, 16, 17, 31])
def test_the_parallel_form_is_the_papers_sum(T):
    k, v, w, u = wkv_inputs(2, T)
    out, *_ = rwkv.wkv(k, v, w, u, rwkv.nothing((2, 5), "cpu", torch.float64), None)
    for row in range(2):
        assert_close(out[row], by_hand(k[row], v[row], w, u), 1e-12)


def test_token_by_token_is_the_same_and_leaves_the_same_state():
    k, v, w, u = wkv_inputs(3, 23)
    past = rwkv.nothing((3, 5), "cpu", torch.float64)
    whole, *end = rwkv.wkv(k, v, w, u, past, None)
    steps = []
    for t in range(23):
        out, *past = rwkv.wkv_step(k[:, t:t + 1], v[:, t:t + 1], w, u, past, None)
        steps.append(out)
    assert_close(torch.cat(steps, 1), whole, 1e-12)
    for a, b in ((past[1], end[1]), (past[2], end[2])):
        assert_close(a * past[3].exp(), b * end[3].exp(), 1e-12)             # the tops may differ, the sums may not


def test_huge_keys_overflow_nothing():
    """e^(+-400) is beyond fp32 and fp64 alike; the largest key decides, as in a softmax."""
    k = torch.tensor([[[400.0], [-400.0], [400.0], [0.0]]])
    v = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    w, u = torch.tensor([-1.0]), torch.tensor([0.0])
    out, *past = rwkv.wkv(k, v, w, u, rwkv.nothing((1, 1), "cpu", torch.float32), None)
    assert bool(torch.isfinite(torch.stack(past)).all())
    # third token: 3 e^400 against 1 e^(400 - 1): (3 + e^-1) / (1 + e^-1); fourth: the same two, faded once more
    assert_close(out.flatten(), torch.tensor([1.0, 1.0, (3 + 0.36788) / 1.36788, (3 + 0.1353353) / 1.1353353]), 1e-5)


def test_gradients_also_through_pads_and_document_borders():
    k, v, w, u = (x.requires_grad_() for x in wkv_inputs(2, 7, 3))
    mask = torch.tensor([[0, 1, 1, 2, 0, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    past = rwkv.nothing((2, 3), "cpu", torch.float64)
    real = (mask > 0)[..., None]
    for at in (None, rwkv.layout(mask)):
        def work(k, v, w, u, at=at):
            return rwkv.wkv(k, v, w, u, past, at)[0] * (1 if at is None else real)
        assert torch.autograd.gradcheck(work, (k, v, w, u))


def test_layout_is_the_example_of_its_docstring():
    at = rwkv.layout(torch.tensor([[0, 1, 1, 2, 2, 0]]))
    assert at.before.tolist() == [[0, 0, 2, 3, 4, 5]] and at.last.tolist() == [5]
    assert at.start.int().tolist() == [[0, 0, 0, 1, 0, 0]] and at.real.int().tolist() == [[0, 1, 1, 1, 1, 0]]


# ---------------------------------------------------------------- transformers

@pytest.mark.parametrize("changes", [{}, {"attention_hidden_size": None, "intermediate_size": None},
                                     {"layer_norm_epsilon": 1e-2}, {"num_hidden_layers": 1 + 1},
                                     {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5, 19])
def test_logits_are_transformers(tmp_path, changes, T):
    reference = theirs(tmp_path, **changes)
    ours, _ = checkpoints.load(tmp_path)
    ids = random_ids(3, T)
    with torch.no_grad():
        assert_close(ours(ids), ask(reference, ids), 2e-5)


def test_rescaling_is_a_trick_for_fp16_and_changes_nothing(tmp_path):
    """Seven layers, rescale_every 3 in the file: with eps tiny they rescale and we do not, and the logits are equal."""
    reference = theirs(tmp_path, num_hidden_layers=7, rescale_every=3, layer_norm_epsilon=1e-9)
    ours, _ = checkpoints.load(tmp_path)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close(ours(ids), ask(reference, ids), 1e-4)
    assert reference.rwkv.layers_are_rescaled
    plain = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"rescale_every": 0}
    (tmp_path / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    with torch.no_grad():
        assert torch.equal(checkpoints.load(tmp_path)[0](ids), ours(ids))


def test_greedy_text_is_transformers(tmp_path):
    reference = theirs(tmp_path, attention_hidden_size=48)
    ours, _ = checkpoints.load(tmp_path)
    prompts = random_ids(3, 6)
    for row in prompts:
        text = row[None]
        for _ in range(10):                                                    # without their cache: one pass a token
            text = torch.cat((text, ask(reference, text)[:, -1].argmax(-1, keepdim=True)), 1)
        assert ours.generate(row[None], 10, temperature=0.0).tolist() == text[:, 6:].tolist()
    assert ours.generate(prompts, 10, temperature=0.0)[2].tolist() == text[0, 6:].tolist()


def test_gradients_are_transformers(tmp_path):
    reference = theirs(tmp_path).train()
    ours = checkpoints.load(tmp_path)[0].train()
    ids = random_ids(1, 11)
    reference(ids, labels=ids, use_cache=False).loss.backward()
    logp = ours(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    (-logp.mean()).backward()
    there = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad, there[layouts.file_name(name, ours.origin.family)].grad, 2e-4, name)


# ---------------------------------------------------------------- one text, many ways

def test_with_a_state_in_pieces_and_token_by_token():
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, ids = tiny(dtype), random_ids(3, 20)
        with torch.no_grad():
            whole = model.hidden(ids)
            for cuts in ((5, 1, 1, 13), (1,) * 20, (19, 1)):
                state = State(model.config, 3, "cpu", dtype)
                parts = [model.hidden(part, None, state) for part in ids.split(cuts, 1)]
                assert_close(torch.cat(parts, 1), whole, tolerance, cuts)


@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
def test_padding_changes_no_real_token_and_no_state(side):
    model, texts = tiny(torch.float64), [random_ids(1, n, seed=n) for n in (1, 4, 9)]
    lengths = {"left": lambda n: (9 - n, 0), "right": lambda n: (0, 9 - n), "both": lambda n: (2, 10 - n)}
    ids, mask = [], []
    for text in texts:
        n = text.shape[1]
        if side == "inside":                                                  # after each real token another pad
            row = torch.stack((text[0], torch.full((n,), 50)), 1).flatten()
            real = torch.tensor([1, 0]).repeat(n)
            before, after = 0, 18 - 2 * n
        else:
            row, real, (before, after) = text[0], torch.ones(n, dtype=torch.int64), lengths[side](n)
        ids.append(nn.functional.pad(row, (before, after), value=50))
        mask.append(nn.functional.pad(real, (before, after)))
    ids, mask = torch.stack(ids), torch.stack(mask)
    state = State(model.config, 3, "cpu", torch.float64)
    with torch.no_grad():
        got = model.hidden(ids, mask, state)
        after = model.hidden(torch.full((3, 1), 7), None, state)              # one token more, from the state alone
        for i, text in enumerate(texts):
            assert_close(got[i][mask[i] > 0], model.hidden(text)[0], 1e-10, f"row {i}")
            more = torch.cat((text, torch.full((1, 1), 7)), 1)
            assert_close(after[i, 0], model.hidden(more)[0, -1], 1e-10, f"state of row {i}")
    assert_close(model(ids, mask)[mask > 0], model.lm_head(got)[mask > 0], 1e-12)


def test_packed_documents_do_not_see_each_other():
    model, texts = tiny(torch.float64), [random_ids(1, n, seed=n) for n in (6, 1, 8)]
    ids = torch.cat((*texts, torch.full((1, 2), 50)), 1)
    mask = torch.tensor([[1] * 6 + [2] + [3] * 8 + [0] * 2])
    with torch.no_grad():
        got = model.hidden(ids, mask)[:, :15].split((6, 1, 8), 1)
    for part, text in zip(got, texts):
        assert_close(part, model.hidden(text), 1e-10)


def test_generate_is_the_same_in_any_batch_and_padding():
    model, texts = tiny(), [random_ids(1, n, seed=n) for n in (1, 5, 8)]
    alone = [model.generate(text, 12, temperature=0.0)[0].tolist() for text in texts]
    for side in ("left", "right"):
        ids, mask = torch.full((3, 8), 50), torch.zeros(3, 8, dtype=torch.int64)
        for i, text in enumerate(texts):
            n = text.shape[1]
            where = slice(8 - n, 8) if side == "left" else slice(0, n)
            ids[i, where], mask[i, where] = text[0], 1
        assert model.generate(ids, 12, mask, 0.0).tolist() == alone
    end = alone[0][3]                                                         # rows that end leave the state
    new = model.generate(ids, 12, mask, 0.0, eos_ids=[end], pad_id=96).tolist()
    for row, text in zip(new, alone):
        n = text.index(end) + 1 if end in text else len(text)
        assert row[:n] == text[:n] and set(row[n:]) <= {96}


def test_checkpointing_gives_the_same_gradients():
    ids = random_ids(2, 9)
    grads = []
    for on in (False, True):
        model = tiny(torch.float64).train()
        model.checkpointing = on
        model(ids).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert_close(a, b, 1e-12)


def test_fresh_weights_can_learn():
    torch.manual_seed(0)
    model, ids = RWKV(RWKVConfig(**{**SIZES, "num_layers": 1, "tie_embeddings": True})), random_ids(2, 12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(4.57, abs=0.3) and losses[-1] < 0.5     # log 97, and by heart


def test_bf16_keeps_its_decays_in_fp32_and_stays_close(tmp_path):
    theirs(tmp_path)
    exact, half = (checkpoints.load(tmp_path, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    kept = {n.split(".")[-1] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"time_decay", "time_first"} and half.norm.weight.dtype == torch.bfloat16
    ids = random_ids(2, 30)
    with torch.no_grad():
        assert half(ids).dtype == torch.bfloat16 and error(half(ids), exact(ids)) < 0.05
    assert half.generate(ids, 4, temperature=0.0).shape == (2, 4)


# ---------------------------------------------------------------- files

def blinkdl(model: RWKV, path: Path, change=lambda state: None) -> Path:
    """The original project's names, written down here a second time."""
    state = {}
    for name, p in model.state_dict().items():
        for ours, original in (("embed_tokens", "emb"), ("embed_norm", "blocks.0.ln0"), ("lm_head", "head"),
                               ("layers.", "blocks."), ("attention", "att"), ("feed_forward", "ffn"),
                               ("mix_key", "mix_k"), ("mix_value", "mix_v"), ("mix_receptance", "mix_r")):
            name = name.replace(ours, original)
        state[re.sub("^norm", "ln_out", name)] = p
    change(state)
    torch.save(state, path)
    return path


def test_blinkdl_files_as_file_and_as_directory(tmp_path):
    model, ids = tiny(), random_ids(2, 7)
    path = blinkdl(model, tmp_path / "RWKV-4-Pile-ctx4096-20230101.pth")
    for place in (path, tmp_path):
        loaded, _ = checkpoints.load(place)
        assert torch.equal(loaded(ids), model(ids))
        assert (loaded.config.max_positions, loaded.config.attention_size) == (4096, 40)
    assert checkpoints.read_config(path) == loaded.config


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"no sample in {SAMPLE}")
def test_sample_of_blinkdls_file():
    model, ref = checkpoints.load(SAMPLE / "ckpt")[0], torch.load(SAMPLE / "ref.pt", weights_only=True)
    with torch.no_grad():
        assert_close(model(ref["input_ids"]), ref["logits"], 1e-5)
    assert torch.equal(model.generate(ref["prompt_ids"], 12, temperature=0.0), ref["generated"])


def test_saved_directories_are_transformers_too(tmp_path):
    from transformers import AutoModelForCausalLM
    byte_tokenizer(tmp_path / "t")
    tokenizer = tokenizers.load_tokenizer(tmp_path / "t")
    for changes in ({}, {"tie_embeddings": True}):
        model, ids = tiny(vocab_size=259, **changes), random_ids(2, 9)
        checkpoints.save(model, tokenizer, tmp_path / "out")
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        again, words = checkpoints.load(tmp_path / "out")
        with torch.no_grad():
            assert_close(model(ids), ask(reference, ids), 2e-5)
        assert torch.equal(again(ids), model(ids)) and again.config == model.config
        assert words.eos_ids == tokenizer.eos_ids == [reference.generation_config.eos_token_id]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)             # what merging an adapter of the head does
    checkpoints.save(model, None, tmp_path / "out")
    assert torch.equal(checkpoints.load(tmp_path / "out")[0](ids), model(ids))


def test_adapters_are_pefts(tmp_path):
    """Ours on their model, and merged at load: both must be our live one."""
    import peft
    reference, ids = theirs(tmp_path / "base"), random_ids(2, 9)
    model, _ = checkpoints.load(tmp_path / "base")
    lora.apply(model, 4, 8.0, name="a")
    assert {p.split(".")[-1] for p, _ in lora.layers(model)} == {"key", "value", "receptance", "output"}
    assert len(list(lora.layers(model))) == 3 * 7
    for i, (_, p) in enumerate(lora.parameters(model, "a")):
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    lora.save(model, "a", tmp_path / "adapter", base=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    merged, _ = checkpoints.load(tmp_path / "adapter")
    with torch.no_grad(), lora.use(model, "a"):
        live = model(ids)
        assert error(live, merged(ids)) < 2e-5 and error(live, ask(adapted, ids)) < 2e-5
        with lora.use(model, None):
            assert error(live, model(ids)) > 0.01


@pytest.mark.parametrize("change, says", [
    ({"tensors": {"rwkv.blocks.1.attention.time_decay": None}}, "rwkv.blocks.1.attention.time_decay is missing"),
    ({"tensors": {"rwkv.blocks.2.ln2.bias": torch.zeros(47)}}, r"rwkv.blocks.2.ln2.bias is \(47,\), the config asks"),
    ({"tensors": {"rwkv.blocks.0.tiny_q.weight": torch.zeros(3)}}, "tensor rwkv.blocks.0.tiny_q.weight of model.safe"),
    ({"tensors": {"rwkv.ln_out.weight": torch.zeros(48, dtype=torch.int8)}}, "ln_out.weight is torch.int8"),
    ({"tensors": {"head.weight": None}}, "head.weight is missing"),
    ({"num_hidden_layers": 4000}, "blocks.3.attention|blocks.3.ln1.*4000 layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"), ({"hidden_size": -1}, "hidden_size is -1"),
    ({"vocab_size": 1 << 40}, "vocab_size is"), ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is x"),
    ({"hidden_size": None}, "lacks 'hidden_size'")])
def test_bad_files_are_named(tmp_path, change, says):
    theirs(tmp_path)
    edit_saved(tmp_path, **change)
    with pytest.raises(UserError, match=says) as caught:
        checkpoints.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_pth_file_that_is_something_else(tmp_path):
    for change, says in ((lambda s: s.pop("emb.weight"), "no RWKV-4 file"), (lambda s: s.clear(), "no tensors"),
                         (lambda s: s.pop("blocks.0.ffn.key.weight"), "blocks.0.ffn.key.weight"),
                         (lambda s: s.update({"blocks.0.att.ln_x.weight": torch.ones(3)}), "RWKV-5 or later"),
                         (lambda s: s.update({"emb.weight": torch.ones(3)}), "no matrix")):
        with pytest.raises(UserError, match=says):
            checkpoints.load(blinkdl(tiny(), tmp_path / "x.pth", change))


# ---------------------------------------------------------------- training

def rows(*lengths: int) -> list[dict]:
    """As data.batch makes them: two ids of prompt, then supervised ids."""
    return [{"ids": random_ids(1, n, n)[0].tolist(), "mask": [0, 0] + [1] * (n - 2)} for n in lengths]


def test_sft_loss_and_gradients_of_packed_rows_are_those_of_single_ones():
    model, talks = tiny(torch.float64).train(), rows(5, 9, 3, 6, 4)
    n = sum(sum(row["mask"]) for row in talks)
    bins = list(data_batch.pack([{**row, "where": ""} for row in talks], 14))
    assert len(bins) == 2
    results = []
    for part in (bins, *([row] for row in talks)):
        ids, docs, mask = sft.collate(part, 0, "cpu")
        assert (docs is None) == (part is not bins)
        model.zero_grad()
        loss = sft.batch_loss(model, ids, docs, mask, n)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, grads), *alone = results
    assert_close(loss[None], sum(x for x, _ in alone)[None], 1e-6)
    for i, g in enumerate(grads):
        assert_close(g, sum(x[i] for _, x in alone), 1e-5, i)


@pytest.mark.parametrize("r", [0, 8])
def test_sft_learns_and_its_model_is_transformers_too(tmp_path, r):
    """The script as a user runs it, with packing; then the text of the trained model, and transformers' logits."""
    from transformers import AutoModelForCausalLM
    byte_tokenizer(tmp_path / "t")
    tokenizer = tokenizers.load_tokenizer(tmp_path / "t")
    model = scatter(RWKV(RWKVConfig(vocab_size=259, hidden_size=64, num_layers=2)))
    checkpoints.save(model, tokenizer, tmp_path / "base")
    answer = {"role": "assistant", "content": "yes"}
    write_rows(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": c}, answer]}
                                      for c in "abcdefgh" * 12])
    out = run("sft.py", "--init", tmp_path / "base", "--data", tmp_path / "d.jsonl", "--out_dir", tmp_path / "out",
              "--steps", 60, "--lora_r", r, "--lr", "5e-3", "--batch_size", 8, "--max_len", 128, "--answer_len", 8,
              *TINY)
    assert "GATE sft PASS" in out and figure(tmp_path / "out", "eval/loss", -1) < 0.1 < figure(
        tmp_path / "out", "eval/loss", 0)
    trained, tokenizer = checkpoints.load(tmp_path / "out/model")
    prompt = torch.tensor([tokenizer.render([{"role": "user", "content": "q"}], add_generation_prompt=True)[0]])
    text = trained.generate(prompt, 8, temperature=0.0, eos_ids=tokenizer.eos_ids)[0].tolist()
    assert tokenizer.decode(text) == "yes<|im_end|>"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").eval()
    with torch.no_grad():
        assert_close(trained(prompt), ask(reference, prompt), 2e-5)
        if r:                                                          # the adapter on the base is the same model
            assert_close(checkpoints.load(tmp_path / "base", lora=[tmp_path / "out/adapter"])[0](prompt),
                         trained(prompt), 1e-5)


@pytest.mark.parametrize("r, dtype", [(0, torch.float32), (8, torch.float32), (8, torch.bfloat16)])
def test_memory_estimate_against_the_real_peak(r, dtype):
    config = RWKVConfig(vocab_size=500, hidden_size=128, num_layers=6)
    for on in (False, True):
        plan = memory.Plan(config, "sft", 4, 100, lora_r=r, dtype=dtype, checkpointing=on)
        model = checkpoints.build(config, dtype)
        if r:
            lora.apply(model, r, 16.0, name="sft")
        model.checkpointing = on

        def step(model=model):
            with lora.use(model, "sft" if r else None):
                model.hidden(random_ids(4, 100)).float().square().mean().backward()
        step()
        assert memory.activations(plan) == pytest.approx(peak_bytes(step), rel=0.3 if on else 0.1)
    table = memory.estimate(config, "sft", lora_r=r, dtype=dtype)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert table.roles[0].weights + (table.roles[1].weights if r else 0) == real
    with pytest.raises(UserError, match="not RWKVConfig"):
        memory.estimate(config, "ppo")
