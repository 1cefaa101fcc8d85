"""sft.py: the loss against transformers' and against hand-worked numbers, and the ways in which an SFT loss goes wrong
unseen.

The ids in brackets (S1, S7, ...) number the details of supervised fine-tuning; each test is named after the mistake it
finds.
"""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, random_ids, tiny_model, twins
from torch import Tensor

import common
import lora
import sft
from data import batch as data_batch

WORLD = common.World(torch.device("cpu"), torch.float32)
END, PAD = 2, 0
TOKENIZER = SimpleNamespace(eos_ids=[END], pad_id=PAD)


def talks(lengths=(5, 9, 3, 12), seed: int = 0) -> list[dict]:
    """Rows as data.batch makes them: a prompt of two or more ids, then supervised ids with the end token last."""
    rows = []
    for i, n in enumerate(lengths):
        ids = random_ids(1, n, seed + i)[0].tolist()
        ids[-1] = END
        prompt = 2 if n < 6 else 4
        rows.append({"ids": ids, "mask": [0] * prompt + [1] * (n - prompt), "where": f"file:{i + 1}"})
    return rows


def gradients(model, *losses: Tensor) -> list[Tensor]:
    """Of the sum of the losses, one backward each: how a script accumulates."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_gradients(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    assert len(a) == len(b) > 0, (len(a), len(b))
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_close(x, y, tolerance, f"gradient {i}")


# ---------------------------------------------------------------- the number itself

def test_loss_is_the_hand_worked_number():
    """Two tokens, logits 0 and log 3: p = 1/4, 3/4. ids 0 1 0, all supervised: the first is never predicted, then
    p(1) = 3/4 and p(0) = 1/4:  (-log 3/4 - log 1/4) / 2 = (0.2877 + 1.3863) / 2 = 0.8370"""
    logits = torch.tensor([[[0.0, math.log(3)]] * 3])
    ids = torch.tensor([[0, 1, 0]])
    assert sft.loss(logits, ids, torch.ones_like(ids)).item() == pytest.approx(0.8370, abs=5e-5)
    assert sft.loss(logits, ids, torch.tensor([[1, 1, 0]])).item() == pytest.approx(0.2877, abs=5e-5)


def test_loss_of_a_uniform_guess_is_log_v():
    ids = random_ids(2, 6)
    assert sft.loss(torch.zeros(2, 6, 97), ids, torch.ones_like(ids)).item() == pytest.approx(math.log(97), rel=1e-6)


def test_loss_equals_transformers():
    theirs, ours = twins(tiny_model().config)
    ids, mask, _ = padded(talks())
    labels = ids.masked_fill(mask == 0, -100)
    expected = theirs(input_ids=ids, labels=labels).loss
    assert_close(sft.loss(ours(ids), ids, mask)[None], expected[None], 2e-6)


def padded(rows: list[dict], pad_id: int = PAD) -> tuple[Tensor, Tensor, Tensor | None]:
    ids, docs, mask = sft.collate(rows, pad_id, "cpu")
    return ids, mask, docs


def test_batch_loss_skips_the_head_and_gives_the_same():
    """The head is computed for supervised positions only: value and every gradient stay."""
    model = tiny_model()
    ids, mask, _ = padded(talks())
    whole, short = sft.loss(model(ids), ids, mask), sft.batch_loss(model, ids, None, mask)
    assert_close(short[None], whole[None], 2e-6)
    expected = gradients(model, sft.loss(model(ids), ids, mask))
    assert_same_gradients(gradients(model, sft.batch_loss(model, ids, None, mask)), expected, 1e-5)
    seen = []
    model.lm_head.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    sft.batch_loss(model, ids, None, mask)
    assert seen == [int(mask[:, 1:].sum())], seen


def test_s6_shifted_once_and_in_the_right_direction():
    """(S6) A model whose logits name the next token has loss 0; one that names the present token, or the one after
    next, pays 100 nats for every token that differs."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    mask = torch.ones_like(ids)
    name = F.one_hot(torch.arange(5, 13), 20).float()[None] * 100
    for ahead, expected in ((1, 0.0), (0, 100.0), (2, 100.0)):
        assert sft.loss(name[:, ahead:ahead + 6], ids, mask).item() == pytest.approx(expected, abs=1e-4), ahead


# ---------------------------------------------------------------- what is supervised

def test_s1_prompt_tokens_are_no_targets():
    """(S1) Other prompt ids under the same logits: the same loss. Logits that predict an unsupervised token get exactly
    zero gradient, all others get one."""
    logits = torch.randn(2, 7, 97, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = random_ids(2, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 1, 1]])
    loss = sft.loss(logits, ids, mask)
    loss.backward()
    other = torch.where(mask == 1, ids, (ids + 11) % 97)
    assert torch.equal(sft.loss(logits, other, mask), loss)
    trained = (logits.grad != 0).any(-1).long()
    assert trained.tolist() == [[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0]]      # one to the left of the mask


def test_s2_the_end_token_is_trained():
    """(S2) The position that predicts the end token has a gradient, in every row, also behind right padding."""
    model = tiny_model()
    rows = talks()
    ids, mask, _ = padded(rows)
    logits = model(ids).detach().requires_grad_()
    sft.loss(logits, ids, mask).backward()
    for i, row in enumerate(rows):
        at = len(row["ids"]) - 1
        assert ids[i, at] == END and logits.grad[i, at - 1].abs().max() > 1e-6, f"row {i}"
        assert logits.grad[i, at - 1, END] < 0, "the gradient must raise the end token"
        assert not logits.grad[i, at:].any(), "behind the end nothing is trained"


def test_s3_pad_may_be_the_end_token():
    """(S3) With pad == eos the loss and gradients are those of rows without any padding: masks go by position, never by
    id. One prompt also holds an end token of an earlier turn, which is not supervised and stays."""
    model = tiny_model()
    rows = talks()
    rows[1]["ids"][1] = END
    n = sum(sum(row["mask"]) for row in rows)
    ids, mask, _ = padded(rows, pad_id=END)
    assert mask.tolist() == [row["mask"] + [0] * (12 - len(row["mask"])) for row in rows]
    together = gradients(model, sft.batch_loss(model, ids, None, mask))
    alone = gradients(model, *[sft.batch_loss(model, *batch(row), n) for row in rows])
    assert_same_gradients(together, alone, 1e-5)


def batch(row: dict) -> tuple[Tensor, None, Tensor]:
    return torch.tensor([row["ids"]]), None, torch.tensor([row["mask"]])


def test_s14_loss_does_not_see_the_amount_of_padding():
    """(S14) Ten more pads on the right: the same loss."""
    model = tiny_model()
    ids, mask, _ = padded(talks())
    longer = sft.batch_loss(model, F.pad(ids, (0, 10), value=7), None, F.pad(mask, (0, 10)))
    assert_close(longer[None], sft.batch_loss(model, ids, None, mask)[None], 2e-6)


def test_a_micro_batch_without_supervised_tokens_is_zero():
    """No token of the batch is supervised (its answer was cut off): 0 with zero gradients, not 0/0."""
    model = tiny_model()
    ids = random_ids(2, 6)
    for n_tokens in (None, 0, 40):
        loss = sft.batch_loss(model, ids, None, torch.zeros_like(ids), n_tokens)
        assert loss.item() == 0.0, (n_tokens, loss)
        assert all(not g.any() for g in gradients(model, loss)), n_tokens


# ---------------------------------------------------------------- means over the whole step

def test_s7_gradient_accumulation_is_the_big_batch():
    """(S7) Four micro-batches of one row each, 3, 5, 1 and 8 supervised tokens: their sum over the 17 of the step is
    the big batch. A mean of the four means would weigh the short answer eight times as much as the long one."""
    model = tiny_model().double()
    rows = talks((5, 9, 3, 12))
    counts = [sum(row["mask"]) for row in rows]
    assert counts == [3, 5, 1, 8], counts
    ids, mask, _ = padded(rows)
    big = sft.batch_loss(model, ids, None, mask)
    parts = [sft.batch_loss(model, *batch(row), sum(counts)) for row in rows]
    assert_close(sum(parts)[None], big[None], 1e-6)
    means = sum(sft.batch_loss(model, *batch(row)) for row in rows) / 4
    assert abs(means.item() / big.item() - 1) > 0.01, "the example must tell the two apart"
    assert_same_gradients(gradients(model, *[sft.batch_loss(model, *batch(row), sum(counts)) for row in rows]),
                          gradients(model, sft.batch_loss(model, ids, None, mask)), 1e-6)


def test_s7_a_step_is_that_of_the_big_batch_whatever_its_micro_batches():
    """(S7) The step of main, by gradient descent at rate 1: the weights move by the gradient of one loss over the 17
    supervised tokens, cut to grad_clip; the figures are those of the whole step."""
    rows = talks((5, 9, 3, 12))

    def moved(size: int, grad_clip: float = 0.0) -> tuple[list[Tensor], dict]:
        model = tiny_model().double()
        before = [p.detach().clone() for p in model.parameters()]
        cfg = sft.Config(micro_batch=size, lora_r=0, grad_clip=grad_clip)
        figures = sft.improve(model, rows, torch.optim.SGD(model.parameters(), lr=1.0), TOKENIZER, cfg, WORLD, 0)
        return [b - p.detach() for p, b in zip(model.parameters(), before)], figures

    model = tiny_model().double()
    ids, mask, _ = padded(rows)
    expected = gradients(model, sft.loss(model(ids), ids, mask))
    norm = math.sqrt(sum(float((g ** 2).sum()) for g in expected))
    for size in (1, 3, 4):
        gradient, figures = moved(size)
        assert_same_gradients(gradient, expected, 1e-6)
        assert figures["loss"] == pytest.approx(sft.loss(model(ids), ids, mask).item(), rel=1e-6)
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert (figures["num_tokens"], figures["num_end_tokens"], figures["loss_weight"]) == (17, 4, 1.0)
    assert_same_gradients(moved(3, 0.1)[0], [g * 0.1 / norm for g in expected], 1e-5)


def test_s7_held_out_loss_is_a_mean_over_tokens():
    """(S7, S17) evaluate over micro-batches of two rows of unequal length == one loss over all supervised tokens."""
    model, rows = tiny_model(), talks((5, 9, 3, 12, 7))
    ids, mask, _ = padded(rows)
    cfg = sft.Config(micro_batch=2, lora_r=4)
    measured = sft.evaluate(model, rows, TOKENIZER, cfg, WORLD)
    assert measured["eval/loss"] == pytest.approx(sft.loss(model(ids), ids, mask).item(), rel=1e-5)


def test_s7_ranks_share_the_held_out_rows(monkeypatch):
    """(S7) Two ranks take every second row; the sums over both ranks are those of one process, rows left over
    included."""
    model, rows = tiny_model(), talks((5, 9, 3, 12, 7))
    cfg = sft.Config(micro_batch=2, lora_r=4)
    alone = sft.evaluate(model, rows, TOKENIZER, cfg, WORLD)["eval/loss"]
    sums: list[list[float]] = []
    monkeypatch.setattr(common, "all_sum", lambda x: sums[-1].append(x) or x)
    for rank in (0, 1):
        sums.append([])
        sft.evaluate(model, rows, TOKENIZER, cfg, common.World(WORLD.device, WORLD.dtype, rank, 2))
    total, count = (sum(part[i] for part in sums) for i in (0, 1))
    assert count == sum(sum(row["mask"]) for row in rows)
    assert total / count == pytest.approx(alone, rel=1e-5)


# ---------------------------------------------------------------- packing

def packed(rows: list[dict]) -> dict:
    """All rows in one, numbered 1, 2, 3, ..."""
    return {"ids": sum((row["ids"] for row in rows), []), "mask": sum((row["mask"] for row in rows), []),
            "docs": [i + 1 for i, row in enumerate(rows) for _ in row["ids"]]}


def test_s8_packed_rows_do_not_see_each_other():
    """(S8) Loss and gradients of three conversations in one row == each in its own row: attention stays inside,
    positions start again. A second packed row of another length brings padding along."""
    model = tiny_model().double()
    first, second = talks((5, 9, 6)), talks((7, 4), seed=50)
    n = sum(sum(row["mask"]) for row in first + second)
    ids, docs, mask = sft.collate([packed(first), packed(second)], PAD, "cpu")
    assert ids.shape == (2, 20) and docs[0].tolist() == [1] * 5 + [2] * 9 + [3] * 6
    assert docs[1].tolist() == [1] * 7 + [2] * 4 + [0] * 9
    alone = [sft.batch_loss(model, *batch(row), n) for row in first + second]
    assert_close(sft.batch_loss(model, ids, docs, mask)[None], sum(alone)[None], 1e-6)
    assert_same_gradients(gradients(model, sft.batch_loss(model, ids, docs, mask)), gradients(model, *alone), 1e-5)
    leaky = sft.batch_loss(model, ids, None, mask)
    assert abs(leaky.item() / sum(alone).item() - 1) > 1e-3, "the example must tell the two apart"


@pytest.mark.parametrize("positions, more", [("rope_2d", {}), ("learned_2d", {}), ("alibi", {}), ("learned", {}),
                                             ("rope", {"window": 4})])
def test_s8_packed_rows_of_other_families(positions, more):
    """(S8) Also where each document has a prompt that sees all of itself (GLM: a b [gMASK] <sop> answer), where the
    distance counts, and where positions are rows of a table."""
    glm = positions.endswith("2d")
    model = tiny_model(positions=positions, prefix_ids=(90, 91, 92)[:3 * glm], **more).double()
    rows = talks((9, 12, 7), seed=5)
    for row in rows if glm else ():
        at = row["mask"].index(1)
        row["ids"] = [i % 90 for i in row["ids"][:at]] + [91, 90] + [i % 90 for i in row["ids"][at:]]
        row["mask"] = [0, 0] + row["mask"]
    n = sum(sum(row["mask"]) for row in rows)
    ids, docs, mask = sft.collate([packed(rows)], PAD, "cpu")
    alone = [sft.batch_loss(model, *batch(row), n) for row in rows]
    assert_close(sft.batch_loss(model, ids, docs, mask)[None], sum(alone)[None], 1e-6)
    assert_same_gradients(gradients(model, sft.batch_loss(model, ids, docs, mask)), gradients(model, *alone), 1e-5)
    assert abs(sft.batch_loss(model, ids, None, mask).item() / sum(alone).item() - 1) > 1e-3


def test_s8_s9_pack_keeps_every_supervised_token():
    """(S8, S9) data.batch.pack, then collate: the loss is that of the unpacked rows, also of a text that is supervised
    from its first token: that token has nothing before it, and must not be predicted from the end of its neighbour."""
    model = tiny_model().double()
    rows = talks((5, 9, 6, 11, 3, 8))
    rows.append({"ids": random_ids(1, 6, 99)[0].tolist(), "mask": [1] * 6, "where": "text:1"})
    n = sum(sum(row["mask"][1:]) for row in rows)
    bins = list(data_batch.pack(rows, 20))
    assert len(bins) < len(rows) and max(len(b["ids"]) for b in bins) <= 20
    assert sum(sum(b["mask"][1:]) for b in bins) == n, "supervised tokens, as sft.py counts them"
    ids, docs, mask = sft.collate(bins, PAD, "cpu")
    alone = [sft.batch_loss(model, *batch(row), n) for row in rows]
    assert_close(sft.batch_loss(model, ids, docs, mask, n)[None], sum(alone)[None], 1e-6)
    assert_same_gradients(gradients(model, sft.batch_loss(model, ids, docs, mask, n)), gradients(model, *alone), 1e-5)


def test_collate_without_packing_needs_no_document_numbers():
    ids, docs, mask = sft.collate(talks((3, 5)), 9, "cpu")
    assert docs is None and ids[0, 3:].tolist() == [9, 9] and mask[0].tolist() == [0, 0, 1, 0, 0]


def test_collate_gives_document_numbers_as_soon_as_one_row_needs_them():
    """A row of one document beside a row of two: both have numbers. Rows of one document each have none to give."""
    one, two = {"ids": [5, 6], "mask": [0, 1], "docs": [1, 1]}, {"ids": [5, 6, 7], "mask": [0, 1, 0], "docs": [1, 1, 2]}
    assert sft.collate([one, two], 9, "cpu")[1].tolist() == [[1, 1, 0], [1, 1, 2]]
    assert sft.collate([one, one], 9, "cpu")[1] is None


def test_what_is_in_the_loss_is_counted_in_the_tensors():
    """Of [7 8 | 9 END] two tokens, one of them an end; of [5 | 6 END END] cut behind its first end another two and one.
    The first token of a row is predicted by nothing: it does not count."""
    ids = torch.tensor([[7, 8, 9, 2], [5, 6, 2, 2], [2, 7, 7, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    assert sft.in_the_loss(ids, mask, [2]) == (4, 2) and sft.in_the_loss(ids, mask, [2, 9]) == (4, 3)


def test_packing_gap_is_rounding_and_tells_leaking_documents(monkeypatch):
    """Packed rows lose what their samples lose alone; a collate that forgets the document numbers is seen."""
    model, rows = tiny_model(), data_batch.pack(talks((5, 9, 6, 11, 3, 8)), 20)
    what = model, rows, TOKENIZER, sft.Config(micro_batch=2), WORLD
    assert sft.packing_gap(*what) < 1e-6
    real = sft.collate
    monkeypatch.setattr(sft, "collate", lambda *args: (lambda ids, docs, mask: (ids, None, mask))(*real(*args)))
    assert sft.packing_gap(*what) > 1e-4


# ---------------------------------------------------------------- arithmetic

def test_s13_the_loss_is_taken_in_fp32():
    """(S13) From bf16 logits the loss is that of the same logits in fp32; in bf16 it would be off by a hundredth."""
    logits = (torch.randn(4, 9, 97, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    ids = random_ids(4, 9)
    loss = sft.loss(logits, ids, torch.ones_like(ids))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sft.loss(logits.float(), ids, torch.ones_like(ids)))
    coarse = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(coarse.float() - loss) > 1e-3, "the example must tell bf16 apart"


def test_s13_bf16_model_has_an_fp32_loss():
    model = tiny_model().bfloat16()
    ids, mask, _ = padded(talks())
    loss = sft.batch_loss(model, ids, None, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sft.loss(model.lm_head(model.hidden(ids)), ids, mask))


def test_s11_no_dropout_anywhere():
    """(S11) Two forwards in training mode are the same bit for bit."""
    model = tiny_model().train()
    ids, mask, _ = padded(talks())
    assert torch.equal(sft.batch_loss(model, ids, None, mask), sft.batch_loss(model, ids, None, mask))


def test_s15_only_the_adapter_gets_a_gradient():
    """(S15) At the first step A's gradient is zero, because B is, but it is there; the base has none at all."""
    model = tiny_model()
    lora.apply(model, 4, 8.0, name="sft")
    ids, mask, _ = padded(talks())
    with lora.use(model, "sft"):
        sft.batch_loss(model, ids, None, mask).backward()
    common.check_gradients(list(model.named_parameters()))
    assert all(p.grad.any() for name, p in lora.parameters(model, "sft") if "lora_B" in name)


@pytest.mark.parametrize("full, dtype, expected", [
    (True, torch.bfloat16, torch.bfloat16), (True, torch.float32, torch.float32),
    (False, torch.bfloat16, torch.float32)])
def test_autocast_is_for_full_training_only(full, dtype, expected):
    """fp32 weights compute in bf16 when every weight is trained; with LoRA the base itself has the dtype."""
    x = torch.ones(2, 2)
    with sft.autocast(common.World(torch.device("cpu"), dtype), full):
        assert (x @ x).dtype == expected


# ---------------------------------------------------------------- answers

def greedy(model, prompt: list[int], end: int, n: int) -> list[int]:
    """One token at a time, the whole row again each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@torch.no_grad()
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_answer_ends_with_the_end_token_and_keeps_the_order(pad_is_end):
    """Prompts of unequal length, in no order, answered in batches of two: answer i belongs to prompt i, holds the end
    token if it came and nothing behind it; with pad == eos the padding is not taken for an end."""
    model = tiny_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (9, 3, 12, 4, 7)]
    free = [greedy(model, p, -1, 12) for p in prompts]
    end = free[0][4]                                        # an id that the first answer reaches in the middle
    expected = [greedy(model, p, end, 12) for p in prompts]
    assert len({len(e) for e in expected}) > 1, "the example must have answers that end and answers that do not"
    tokenizer = SimpleNamespace(eos_ids=[end], pad_id=end if pad_is_end else PAD)
    assert sft.answer(model, prompts, tokenizer, 12, rows=2) == expected


def test_answer_samples_by_seed():
    """temperature > 0: the same seed gives the same texts, another one others."""
    model, prompts = tiny_model(), [[5, 6, 7], [8, 9]]
    a, b, c = (sft.answer(model, prompts, TOKENIZER, 8, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_sample_answers_reports_the_share_that_ended(monkeypatch):
    """Two answers, one ends: 0.5; the texts reach samples.jsonl without the end token. Rows without an assistant are
    skipped."""
    tokenizer = SimpleNamespace(eos_ids=[END], decode=lambda ids: " ".join(map(str, ids)),
                                render=lambda messages, add_generation_prompt: ([len(messages)] * 3, [0] * 3))
    monkeypatch.setattr(sft, "answer", lambda model, prompts, tokenizer, n: [[7, 8, END], [7, 8, 9]][:len(prompts)])
    kept: list = []
    run = SimpleNamespace(sample=lambda step, rows: kept.extend((step, row) for row in rows))
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    rows = [talk, {"messages": [{"role": "user", "content": "alone"}]}, talk]
    assert sft.sample_answers(None, rows, tokenizer, sft.Config(eval_answers=5), run, 3) == 0.5
    assert [(step, row["answer"], row["ended"], row["reference"], row["prompt"]) for step, row in kept] == [
        (3, "7 8", True, "Ho", "Hi"), (3, "7 8 9", False, "Ho", "Hi")]
    assert math.isnan(sft.sample_answers(None, [rows[1]], tokenizer, sft.Config(), run, 3))
