"""data/batch.py: from rows to samples to batches. What is cut or left out is counted; what is packed stays apart."""
import random

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from data import batch
from data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return load_tokenizer(folder)


def talk(*turns: str, where: str = "f:1") -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)],
            "where": where}


def supervised(tokenizer, sample: dict) -> str:
    return tokenizer.decode([i for i, m in zip(sample["ids"], sample["mask"], strict=True) if m])


# ---------------------------------------------------------------- encode

def test_sft_supervises_the_answers_and_their_end_tokens(tokenizer):
    samples = batch.encode_sft([talk("Hi", "Hello", "And?", "Bye")], tokenizer, 200)
    assert supervised(tokenizer, samples[0]) == "Hello<|im_end|>Bye<|im_end|>"
    assert "in 1 of 1" in samples.title and not any(samples.counts.values())


def test_sft_keeps_the_first_turns_that_fit(tokenizer):
    row = talk("Hi", "Hello", "And what about a much longer second question?", "Bye")
    whole, first = len(tokenizer.render(row["messages"])[0]), len(tokenizer.render(row["messages"][:2])[0])
    samples = batch.encode_sft([row], tokenizer, whole - 1)
    assert len(samples[0]["ids"]) == first and supervised(tokenizer, samples[0]) == "Hello<|im_end|>"
    assert samples.counts["shortened to fewer turns"] == 1


def test_a_cut_answer_has_no_end_token_and_is_counted(tokenizer):
    """The other sample has one; with none at all a model would never learn to stop, which is an error."""
    n = len(tokenizer.render(talk("Hi", "x")["messages"])[0])
    samples = batch.encode_sft([talk("Hi", "y" * 50), talk("Hi", "x")], tokenizer, n)
    assert samples.counts["cut within the answer"] == 1 and set(supervised(tokenizer, samples[0])) == {"y"}
    with pytest.raises(UserError, match="never stop"):
        batch.encode_sft([talk("Hi", "y" * 50)], tokenizer, n)


def test_a_prompt_that_fills_the_row_is_dropped_and_counted(tokenizer, capsys):
    samples = batch.encode_sft([talk("q" * 100, "a"), talk("Hi", "x")], tokenizer, 60)
    assert len(samples) == 1 and samples.counts["dropped, prompt alone is too long"] == 1
    samples.print_report()
    assert "1 dropped, prompt alone is too long" in capsys.readouterr().out


def test_a_last_question_without_answer_is_left_out(tokenizer):
    samples = batch.encode_sft([talk("Hi", "Hello", "And?")], tokenizer, 200)
    assert samples[0]["ids"] == tokenizer.render(talk("Hi", "Hello")["messages"])[0]


def test_plain_text_is_supervised_whole(tokenizer):
    samples = batch.encode_sft([{"text": "abc", "where": "f:1"}], tokenizer, 50)
    assert tokenizer.decode(samples[0]["ids"]) == "abc<|im_end|>" and all(samples[0]["mask"])


def test_last_answers_as_in_its_docstring_and_texts_without_a_prompt(tokenizer, capsys):
    samples = batch.Samples([{"ids": list(range(9)), "mask": [0, 0, 1, 1, 0, 0, 1, 1, 0]},
                             {"ids": [5, 6], "mask": [0, 1]}])
    kept = batch.last_answers(samples)
    assert [s["mask"] for s in kept] == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 1]] and kept[0]["ids"] == list(range(8))
    assert kept.counts == {"earlier answers read as prompt": 1}
    two = batch.last_answers(batch.encode_sft([talk("hi", "ho", "he", "ha")], tokenizer, 200))[0]
    assert supervised(tokenizer, two) == "ha<|im_end|>" and "ho<|im_end|>" in tokenizer.decode(two["ids"])
    with pytest.raises(UserError, match="f:7: a text without a prompt"):
        batch.last_answers(batch.encode_sft([{"text": "hello", "where": "f:7"}], tokenizer, 200))


def test_split_as_in_its_docstring():
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 8, 9, 0]]), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    prompt, seen, answer, real = batch.split(ids, mask)
    assert (prompt * seen).tolist() == [[5, 6], [5, 0]] and seen.tolist() == [[1, 1], [1, 0]]
    assert answer.tolist() == [[7, 8], [8, 9]] and real.tolist() == [[True, True], [True, True]]
    prompt, seen, answer, real = batch.split(torch.tensor([[5, 6, 7, 8], [5, 8, 0, 0]]), torch.tensor(
        [[0, 0, 1, 1], [0, 1, 0, 0]]))
    assert real.tolist() == [[True, True], [True, False]] and (answer * real).tolist() == [[7, 8], [8, 0]]
    with pytest.raises(AssertionError, match="without a prompt"):
        batch.split(ids, torch.ones_like(mask))


def test_preferences_end_with_the_end_token_and_share_the_prompt(tokenizer):
    row = {"prompt": [{"role": "user", "content": "Hi"}], "answers": ["good", "so so", "bad"], "where": "f:1"}
    group = batch.encode_preferences([row], tokenizer, 100)[0]
    prompt = tokenizer.render(row["prompt"], add_generation_prompt=True)[0]
    assert [ids[:group["prompt_len"]] for ids in group["sequences"]] == [prompt] * 3
    texts = [tokenizer.decode(ids[len(prompt):]) for ids in group["sequences"]]
    assert texts == [answer + "<|im_end|>" for answer in row["answers"]]


def test_a_long_prompt_is_cut_from_the_left_the_same_for_all_answers(tokenizer):
    row = {"prompt": [{"role": "user", "content": "q" * 100}], "answers": ["good", "a longer answer"], "where": "f:1"}
    samples = batch.encode_preferences([row], tokenizer, 60)
    a, b = samples[0]["sequences"]
    n = samples[0]["prompt_len"]
    assert samples.counts["prompts cut from the left"] == 1 and len(b) == 60 and a[:n] == b[:n]
    assert tokenizer.decode(a[n:]) == "good<|im_end|>" and tokenizer.decode(b[n:]) == "a longer answer<|im_end|>"


def test_answers_that_are_too_long_or_equal_are_counted(tokenizer):
    prompt = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "answers": ["good", "x" * 200], "where": "f:1"},
            {"prompt": prompt, "answers": ["same", "same"], "where": "f:2"},
            {"prompt": prompt, "answers": ["good", "bad"], "where": "f:3"}]
    samples = batch.encode_preferences(rows, tokenizer, 80)
    assert [s["where"] for s in samples] == ["f:3"]
    assert samples.counts["answers dropped, too long"] == 1
    assert samples.counts["prompts dropped, fewer than two answers"] == 1
    assert samples.counts["prompts dropped, answers equal after cutting"] == 1
    with pytest.raises(UserError, match="no usable comparison"):
        batch.encode_preferences(rows[:2], tokenizer, 80)


def test_prompts_end_where_the_answer_begins_and_lose_their_beginning(tokenizer):
    rows = [{"prompt": [{"role": "user", "content": c * 30}], "where": "f:1"} for c in "ab"]
    samples = batch.encode_prompts(rows, tokenizer, 40)
    assert all(tokenizer.decode(s["ids"]).endswith("<|im_start|>assistant\n") and len(s["ids"]) == 40 for s in samples)
    assert samples.counts["cut from the left"] == 2


# ---------------------------------------------------------------- pad and pack

def test_pad_as_in_its_docstring():
    ids, mask = batch.pad([[5, 6], [7, 8, 9]], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]] and mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    ids, mask = batch.pad([[5, 6], [7, 8, 9]], 0, side="left")
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_the_mask_comes_from_the_place_not_from_the_id():
    """The pad may be the end token: a real end token must stay real."""
    assert batch.pad([[5, 2], [7, 8, 2]], 2)[1].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("sequences", "side", "told"), [([], "left", "0 sequences"), ([[1]], "up", "on the up")])
def test_pad_refuses_what_it_cannot_pad(sequences, side, told):
    with pytest.raises(AssertionError, match=told):
        batch.pad(sequences, 0, side)


def samples_of(lengths) -> list[dict]:
    return [{"ids": [10 + i] * n, "mask": [1] * n, "where": f"f:{i}"} for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_loses_nothing_splits_nothing_and_fits(lengths):
    rows = batch.pack(samples_of(lengths), 20)
    expected = [10 + i for i, n in enumerate(lengths) for _ in range(n)]
    assert sorted(i for row in rows for i in row["ids"]) == expected
    for row in rows:
        assert len(row["ids"]) == len(row["mask"]) == len(row["docs"]) <= 20
        starts = [t for t, d in enumerate(row["docs"]) if t == 0 or d != row["docs"][t - 1]]
        assert [row["docs"][t] for t in starts] == list(range(1, len(starts) + 1))
        assert all(row["mask"][t] == 0 for t in starts)        # the token before it is another sample's
        assert len(starts) == len(set(row["ids"]))


def test_best_fit_decreasing_packs_tightly():
    named = [{**sample, "where": f"f:{n}"} for n, sample in zip((5, 4, 3, 2), samples_of([5, 4, 3, 2]))]
    rows = batch.pack(named, 7)
    assert [(len(row["ids"]), row["where"]) for row in rows] == [(7, "f:5, f:2"), (7, "f:4, f:3")]
    dice = random.Random(0)
    lengths = [dice.randint(5, 100) for _ in range(400)]
    assert len(batch.pack(samples_of(lengths), 256)) <= sum(lengths) / 256 * 1.02 + 1


def test_packed_rows_give_the_logits_of_single_ones():
    model = tiny_model()
    samples = [{"ids": torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist(), "mask": [1] * n}
               for n in (7, 5, 9)]
    row = batch.pack(samples, 32)[0]
    with torch.no_grad():
        packed = model(torch.tensor([row["ids"]]), torch.tensor([row["docs"]]))[0]
        for d in range(1, 4):
            alone = torch.tensor([[i for i, k in zip(row["ids"], row["docs"], strict=True) if k == d]])
            assert torch.allclose(packed[torch.tensor(row["docs"]) == d], model(alone)[0], atol=2e-5)


# ---------------------------------------------------------------- Batches

@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4))
def test_an_epoch_holds_every_sample_once_over_all_ranks(n, size, world):
    if size < world or n < world:
        with pytest.raises(UserError):
            batch.Batches(list(range(n)), size, world=world)
        return
    ranks = [batch.Batches(list(range(n)), size, seed=3, rank=r, world=world) for r in range(world)]
    seen = []
    while ranks[0].epoch == 0:
        parts = [b.next() for b in ranks]
        assert all(parts), "a rank without samples would wait for the others for ever"
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        seen += [i for part in parts for i in part]
    assert sorted(seen) == list(range(n))


def test_batches_go_on_where_their_state_says():
    a = batch.Batches(list(range(10)), 4, seed=1)
    a.next()
    state = a.state()
    rest = [a.next() for _ in range(5)]
    b = batch.Batches(list(range(10)), 4, seed=1)
    b.load_state(state)
    assert [b.next() for _ in range(5)] == rest


def test_epochs_and_seeds_differ():
    a = batch.Batches(list(range(50)), 50, seed=1)
    first, second = a.next(), a.next()
    assert first != second and sorted(first) == sorted(second)
    assert batch.Batches(list(range(50)), 50, seed=2).next() != first


# ---------------------------------------------------------------- show

def test_show_marks_what_is_supervised(tokenizer):
    ids, mask = tokenizer.render(talk("Hi", "Hello")["messages"])
    text = batch.show(tokenizer, ids, mask, colour=False)
    assert "[[Hello<|im_end|>]]" in text and "user\nHi<|im_end|>" in text
    assert "\033[32mHello<|im_end|>\033[0m" in batch.show(tokenizer, ids, mask, colour=True)
