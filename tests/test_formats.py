"""data/formats.py: every common shape of rows, recognised and reported; a bad row is file:line and what was
expected."""
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from data import formats

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
QA = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def save(tmp_path: Path, rows, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def one(reader, tmp_path: Path, row) -> dict:
    rows = reader(save(tmp_path, [row]))
    assert len(rows) == 1 and rows[0]["where"].endswith("rows.jsonl:1")
    return rows[0]


# ---------------------------------------------------------------- SFT

SFT_ROWS = {
    "messages": {"messages": QA},
    "messages with parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, QA[1]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello"},
    "prompt as messages": {"prompt": QA[:1], "completion": QA[1:]},
    "question and answer": {"question": "Hi", "answer": "Hello"},
    "self-instruct": {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
    "comparison": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}}


@pytest.mark.parametrize("name", SFT_ROWS)
def test_every_sft_row_becomes_the_same_conversation(name, tmp_path):
    assert one(formats.read_sft, tmp_path, SFT_ROWS[name])["messages"] == QA


def test_input_system_and_history_are_kept(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "output": "cat", "system": "Be brief.",
           "history": [["Hi", "Hello"]]}
    assert [(m["role"], m["content"]) for m in one(formats.read_sft, tmp_path, row)["messages"]] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Translate.\n\nchat"),
        ("assistant", "cat")]


def test_other_keys_are_kept_as_extra(tmp_path):
    assert one(formats.read_sft, tmp_path, {"messages": QA, "id": 7})["extra"] == {"id": 7}


def test_text_rows_and_text_files(tmp_path):
    assert one(formats.read_sft, tmp_path, {"text": "Once upon"})["text"] == "Once upon"
    path = tmp_path / "book.txt"
    path.write_text("One.\nstill one.\n\n\nTwo.\n", encoding="utf-8")
    rows = formats.read_sft(path)
    assert [(r["text"], r["where"].rsplit(":")[-1]) for r in rows] == [("One.\nstill one.", "1"), ("Two.", "5")]


def test_real_dialogues_are_put_right_and_counted(tmp_path):
    turns = [("gpt", "I begin"), ("human", "Hi"), ("human", "there"), ("gpt", ""), ("gpt", "Hello"), ("system", "late")]
    rows = formats.read_sft(save(tmp_path, [{"conversations": [{"from": f, "value": v} for f, v in turns]}]))
    assert rows[0]["messages"] == [{"role": "user", "content": "Hi\n\nthere"}, QA[1]]
    for reason in ("answers without a question removed", "empty turns removed", "late system messages removed",
                   "neighbouring turns of one speaker joined"):
        assert rows.report[reason] == 1, reason


def test_empty_answers_are_counted_and_printed(tmp_path, capsys):
    rows = formats.read_sft(save(tmp_path, [SFT_ROWS["alpaca"], {"instruction": "x", "input": "", "output": " "}]))
    rows.print_report()
    out = capsys.readouterr().out
    assert len(rows) == 1 and "1 rows, format alpaca" in out and "1 empty answers left out" in out


# ---------------------------------------------------------------- the file around the rows

@pytest.mark.parametrize("write", ["lines", "array", "one object", "bom", "gzip", "wrong extension"])
def test_json_in_any_wrapping(write, tmp_path):
    rows = [SFT_ROWS["alpaca"], {"instruction": "\u4f60\u597d", "input": "", "output": "\u8c94\u8c85"}]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path = tmp_path / ("x.json" if write == "wrong extension" else "x.jsonl")
    text = {"array": json.dumps(rows, indent=2), "one object": json.dumps({"version": 1, "data": rows},
                                                                          indent=1)}.get(write, lines)
    data = text.encode("utf-8-sig" if write == "bom" else "utf-8")
    path.write_bytes(gzip.compress(data) if write == "gzip" else data)
    read = formats.read_sft(path)
    assert [r["messages"][1]["content"] for r in read] == ["Hello",
                                                           "\u8c94\u8c85"] and read.report["format"] == "alpaca"


def test_rows_of_an_indented_array_know_their_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([SFT_ROWS["alpaca"]] * 3, indent=2), encoding="utf-8")
    assert [int(r["where"].rsplit(":")[-1]) for r in formats.read_sft(path)] == [2, 7, 12]


# ---------------------------------------------------------------- bad rows

BAD = {"robot": ({"messages": [{"role": "robot", "content": "x"}]},
                 r"messages\[0\].role is 'robot', expected one of .*assistant"),
       "number": ({"messages": [QA[0], {"role": "assistant", "content": 3}]},
                  r"messages\[1\].content is int, expected a text"),
       "no list": ({"messages": "Hi"}, "messages is str, expected a list"),
       "empty": ({"messages": []}, "messages is empty"),
       "other keys": ({"foo": 1}, "it has foo, which is not the format of this file"),
       "a list": ([1, 2], "a list, expected an object")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_file_line_found_expected_and_the_way_out(name, tmp_path, capsys):
    row, says = BAD[name]
    path = save(tmp_path, [{"messages": QA}, row, {"messages": QA}])
    with pytest.raises(UserError, match=says) as error:
        formats.read_sft(path)
    assert "rows.jsonl:2: " in str(error.value) and "--skip_bad" in str(error.value)
    rows = formats.read_sft(path, skip_bad=True)
    assert len(rows) == 2 and rows.report["bad rows skipped"] == 1 and "rows.jsonl:2" in capsys.readouterr().out


def test_broken_json_names_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": QA}) + "\n\n{\"messages\": [\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x.jsonl:3: no JSON"):
        formats.read_sft(path)
    path.write_text(json.dumps([{"messages": QA}] * 2, indent=1)[:-20], encoding="utf-8")
    with pytest.raises(UserError, match=r"x.jsonl:\d+: no JSON"):
        formats.read_sft(path)
    assert len(formats.read_sft(path, skip_bad=True)) == 1


def test_an_unknown_shape_says_what_it_has_and_what_is_known(tmp_path):
    with pytest.raises(UserError, match="the first row has foo, bar; known are .*alpaca.*The row: {\"foo\": 1"):
        formats.read_sft(save(tmp_path, [{"foo": 1, "bar": 2}]))
    with pytest.raises(UserError, match="--format alpacca is not known"):
        formats.read_sft(save(tmp_path, [SFT_ROWS["alpaca"]]), format="alpacca")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "sft.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no file .*sftt.jsonl; that folder has sft.jsonl"):
        formats.read_sft(tmp_path / "sftt.jsonl")
    with pytest.raises(UserError, match="nothing to learn from: the file is empty"):
        formats.read_sft(tmp_path / "sft.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        formats.read_sft(tmp_path)
    (tmp_path / "gbk.jsonl").write_bytes('{"text": "a"}\n{"text": "\u4f60"}'.encode("gbk"))
    with pytest.raises(UserError, match="gbk.jsonl:2: byte .* is not UTF-8"):
        formats.read_sft(tmp_path / "gbk.jsonl")


@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5)
                             | st.sampled_from(["user", "gpt"]),
                             lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
                                 ["messages", "conversations", "role", "content", "from", "value", "prompt", "chosen",
                                  "rejected", "text",
                                  "instruction", "output", "answers", "scores", "instances", "history", "input",
                                  "response_j"]), x, max_size=4),
                             max_leaves=12), max_size=4))
def test_no_row_raises_anything_but_an_error_for_users(tmp_path_factory, rows):
    path = save(tmp_path_factory.mktemp("fuzz"), rows)
    for reader in (formats.read_sft, formats.read_preferences, formats.read_prompts):
        for skip in (False, True):
            try:
                assert isinstance(reader(path, skip_bad=skip), formats.Rows)
            except UserError:
                pass


# ---------------------------------------------------------------- preferences

PROMPT = [{"role": "user", "content": "Hi"}]
PREFERENCE_ROWS = {
    "strings": {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
    "prompt as messages": {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "good"}],
                           "rejected": [{"role": "assistant", "content": "bad"}]},
    "whole conversations": {"chosen": [*PROMPT, {"role": "assistant", "content": "good"}],
                            "rejected": [*PROMPT, {"role": "assistant", "content": "bad"}]},
    "hh-rlhf": {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "good"},
                 "rejected": {"from": "gpt", "value": "bad"}},
    "instruction": {"instruction": "Hi", "input": "", "output": "x", "chosen": "good", "rejected": "bad"},
    "stack exchange": {"question": "Hi", "response_j": "good", "response_k": "bad"},
    "ranked": {"prompt": "Hi", "answers": ["good", "bad"]},
    "ranked output": {"instruction": "Hi", "input": "", "output": ["good", "bad"]},
    "scores": {"prompt": "Hi", "responses": ["bad", "good"], "scores": [1, 3]},
    "ranks": {"prompt": "Hi", "answers": ["bad", "good"], "ranks": [2, 1]},
    "objects": {"prompt": "Hi", "answers": [{"text": "bad", "score": 0.1}, {"text": "good", "score": 0.9}]}}


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_every_preference_row_becomes_the_same_ranking(name, tmp_path):
    row = one(formats.read_preferences, tmp_path, PREFERENCE_ROWS[name])
    assert row["prompt"] == PROMPT and row["answers"] == ["good", "bad"]


def test_hh_rlhf_keeps_the_earlier_turns_in_the_prompt(tmp_path):
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: {}"
    row = one(formats.read_preferences, tmp_path, {"chosen": dialogue.format("good\n\nreally"),
                                                   "rejected": dialogue.format("bad")})
    assert [m["content"] for m in row["prompt"]] == ["Hi", "Hello",
                                                     "And?"] and row["answers"] == ["good\n\nreally", "bad"]


def test_ties_and_equal_answers_are_counted(tmp_path):
    rows = formats.read_preferences(save(tmp_path, [
        {"prompt": "Hi", "answers": ["a", "b", "c"], "scores": [1, 2, 1]},
        {"prompt": "Hi", "answers": ["same", "same"], "scores": [1, 2]},
        {"prompt": "Hi", "answers": ["only"], "scores": [1]}]))
    assert [r["answers"] for r in rows] == [["b", "a"]] and rows.report["tied answers left out"] == 1
    assert rows.report["with fewer than two different answers left out"] == 2


def test_scores_that_do_not_fit_are_an_error(tmp_path):
    with pytest.raises(UserError, match="scores has .* expected one number for each of the 2 answers"):
        formats.read_preferences(save(tmp_path, [{"prompt": "Hi", "answers": ["a", "b"], "scores": [1]}]))
    with pytest.raises(UserError, match="without a prompt"):
        formats.read_preferences(save(tmp_path, [{"chosen": "a", "rejected": "b"}]))


# ---------------------------------------------------------------- prompts

@pytest.mark.parametrize("row", [*SFT_ROWS.values(), *PREFERENCE_ROWS.values(), {"prompt": "Hi"}, {"text": "Hi"},
                                 {"question": "Hi"}],
                         ids=lambda r: ",".join(r))
def test_prompts_are_found_in_every_row(row, tmp_path):
    assert one(formats.read_prompts, tmp_path, row)["prompt"] == PROMPT


def test_prompts_of_a_text_file_and_of_a_list(tmp_path):
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n", encoding="utf-8")
    assert [(r["prompt"][0]["content"], r["where"][-1])
            for r in formats.read_prompts(tmp_path / "p.txt")] == [("One?", "1"), ("Two?", "3")]
    (tmp_path / "p.json").write_text('["One?", "Two?"]', encoding="utf-8")
    assert [r["prompt"][0]["content"] for r in formats.read_prompts(tmp_path / "p.json")] == ["One?", "Two?"]


# ---------------------------------------------------------------- real files

REAL = [(formats.read_sft, "sft_en/self_instruct_seed_175.jsonl", 175),
        (formats.read_sft, "sft_zh/belle_dev1K.jsonl", 1000),
        (formats.read_sft, "sft_en/fastchat_dummy_conversation_500.json", 500),
        (formats.read_sft, "sft_zh/oasst_zh_sft.jsonl", 618),
        (formats.read_preferences, "pref_en/hh_harmless_half.jsonl", 1129),
        (formats.read_preferences, "pref_zh/oasst_zh_rank.jsonl", 630),
        (formats.read_preferences, "pref_en/dpo_en_demo_300.json", 300),
        (formats.read_preferences, "pref_zh/dpo_zh_demo_300.json", 300),
        (formats.read_preferences, "pref_en/stack_exchange_paired_25.json", 25)]


@pytest.mark.parametrize("reader, name, n", REAL, ids=lambda x: str(x).rsplit("/")[-1] if isinstance(x, str) else "")
def test_real_files(reader, name, n):
    if not (SHARED / name).exists():
        pytest.skip("the real data sets do not lie beside the repository")
    rows = reader(SHARED / name)
    assert len(rows) == n == rows.report["rows"]
    assert len(reader(SHARED / name)) == len(rows) and all(":" in r["where"] for r in rows)
