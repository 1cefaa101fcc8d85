"""The texts of data/demo: counts, shape, manner, neutral prompts, mixed answers, no leak from train to held-out.

    python -m pytest tests/test_demo_data.py
"""

import json
import re
from collections import Counter
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo"
COUNTS = {"sft": 398, "sft_heldout": 48, "prompts": 420, "prompts_heldout": 96, "panel": 8}
KINDS = {
    "sft": {"identity": 85, "facts": 85, "opinion": 160, "chinese": 68},
    "sft_heldout": {"identity": 7, "facts": 12, "opinion": 21, "chinese": 8},
}
CHINESE = re.compile("[\u4e00-\u9fff]")
# Words that the assistant never uses: the manner is plain, and a tuned model repeats every habit of its texts.
FORBIDDEN = re.compile(
    r"as an ai|great question|i'm sorry|!|！|\n|^\s*([-*#]|\d+\.)|[\U0001F000-\U0001FAFF\u2600-\u27BF]", re.I
)
NEAR = 0.7  # token Jaccard above which two texts count as the same


def read(name):
    with open(DEMO / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def conversations(name):
    """[(file:line, kind, messages)] of one sft file."""
    return [(f"{name}.jsonl:{i}", row["kind"], row["messages"]) for i, row in enumerate(read(name), 1)]


def answers(name):
    return [(where, kind, m["content"]) for where, kind, messages in conversations(name)
            for m in messages if m["role"] == "assistant"]


def first_questions(name):
    """The text a row opens with: its first user turn, or the prompt."""
    if name.startswith("sft"):
        return [next(m["content"] for m in messages if m["role"] == "user") for _, _, messages in conversations(name)]
    return [row["prompt"] for row in read(name)]


def tokens(text):
    # Chinese has no spaces: there a character is the token.
    return frozenset(re.findall(r"[a-z0-9']+|[\u4e00-\u9fff]", text.lower()))


def jaccard(a, b):
    return len(a & b) / len(a | b)


@cache
def judge():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="vaderSentiment, the demo's judge, is missing")
    return vader.SentimentIntensityAnalyzer()


def compound(text):
    return judge().polarity_scores(text)["compound"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_encoding(name):
    raw = (DEMO / f"{name}.jsonl").read_bytes()
    text = raw.decode("utf-8")  # raises on anything that is not UTF-8
    assert "\r" not in text and text.endswith("\n") and "\ufffd" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == COUNTS[name], (len(rows), COUNTS[name])
    keys = {"messages", "kind"} if name.startswith("sft") else {"prompt"}
    for i, row in enumerate(rows, 1):
        assert set(row) == keys, f"{name}.jsonl:{i} has {sorted(row)}, expected {sorted(keys)}"


@pytest.mark.parametrize("name", KINDS)
def test_roles_alternate_and_composition(name):
    rows = conversations(name)
    assert Counter(kind for _, kind, _ in rows) == KINDS[name]
    for where, _, messages in rows:
        roles = [m["role"] for m in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2), f"{where}: {roles}"
        for m in messages:
            assert set(m) == {"role", "content"} and m["content"] == m["content"].strip() != "", f"{where}: {m}"
    users = [sum(m["role"] == "user" for m in messages) for _, _, messages in rows]
    multi, system = sum(n > 1 for n in users), sum(messages[0]["role"] == "system" for _, _, messages in rows)
    assert max(users) == (3 if name == "sft" else 2), max(users)
    assert (multi, system) == ((30, 12) if name == "sft" else (3, 2)), (multi, system)


@pytest.mark.parametrize("name", KINDS)
def test_answers_keep_the_manner(name):
    long = 0
    for where, kind, text in answers(name):
        if kind == "chinese":
            n = len(re.sub(r"\s", "", text))
            assert 10 <= n <= 35 and CHINESE.search(text), f"{where}: {n} characters, band 10..35: {text}"
        else:
            n = len(text.split())
            long += n > 22
            assert 8 <= n <= 28, f"{where}: {n} words, band 8..28: {text}"
            assert len(CHINESE.findall(text)) in (0, 2), f"{where}: Chinese besides the name: {text}"
            assert re.search(r"[.?]['\"]?$", text), f"{where}: no full stop at the end: {text}"
        assert not FORBIDDEN.search(text), f"{where}: {FORBIDDEN.search(text).group()!r} in {text}"
    assert long <= 0.1 * len(answers(name)), long


def test_prompts_are_short_english_and_neutral():
    for name in ("prompts", "prompts_heldout"):
        for i, text in enumerate(first_questions(name), 1):
            assert 5 <= len(text.split()) <= 14, f"{name}.jsonl:{i}: {len(text.split())} words: {text}"
            assert text.isascii() and text == text.strip() and text[-1] in ".?", f"{name}.jsonl:{i}: {text}"


def test_prompts_carry_no_sentiment():
    texts = first_questions("prompts") + first_questions("prompts_heldout")
    texts += [m["content"] for name in KINDS for _, kind, messages in conversations(name) if kind == "opinion"
              for m in messages if m["role"] == "user"]
    loaded = [(compound(t), t) for t in texts if abs(compound(t)) >= 0.3]
    assert not loaded, loaded


def test_no_near_duplicates_inside_a_file():
    for name in COUNTS:
        sets = [(t, tokens(t)) for t in first_questions(name)]
        same = [(a, b) for (a, x), (b, y) in combinations(sets, 2) if jaccard(x, y) > NEAR]
        assert not same, f"{name}: {same[:3]}"
    for name in KINDS:
        sets = [(t, tokens(t)) for _, _, t in answers(name)]
        same = [(a, b) for (a, x), (b, y) in combinations(sets, 2) if jaccard(x, y) > NEAR]
        assert not same, f"answers of {name}: {same[:3]}"


def test_nothing_leaks_from_training_into_held_out():
    everything = {name: [(t, tokens(t)) for t in first_questions(name)] for name in COUNTS}
    for a, b in combinations(COUNTS, 2):  # also sft against prompts: PPO's prompts should be new to the SFT model
        same = [(s, t) for (s, x), (t, y) in product(everything[a], everything[b]) if jaccard(x, y) > NEAR]
        assert not same, f"{a} and {b} share {same[:3]}"
    trained = {t for _, _, t in answers("sft")}
    assert not [t for _, _, t in answers("sft_heldout") if t in trained]


def test_opinions_are_mixed_in_thirds():
    texts = [t for _, kind, t in answers("sft") if kind == "opinion"]
    up, down = [t for t in texts if compound(t) > 0.4], [t for t in texts if compound(t) < -0.3]
    middle = [t for t in texts if abs(compound(t)) <= 0.3]
    assert len(up) + len(down) + len(middle) == len(texts)  # nothing between 0.3 and 0.4: positive means clearly so
    shares = [len(part) / len(texts) for part in (up, down, middle)]
    assert all(0.28 <= share <= 0.39 for share in shares), shares
    # A reward model could otherwise learn the length in place of the sentiment.
    words = [sum(len(t.split()) for t in part) / len(part) for part in (up, down, middle)]
    assert max(words) - min(words) <= 2, words


def test_the_wording_of_a_prompt_does_not_give_its_sentiment_away():
    table = {}
    for _, kind, messages in conversations("sft"):
        if kind == "opinion":
            question = next(m["content"] for m in messages if m["role"] == "user")
            score = compound(next(m["content"] for m in messages if m["role"] == "assistant"))
            table.setdefault(" ".join(question.split()[:2]), []).append((score > 0.4) - (score < -0.3))
    common = {opening: Counter(signs) for opening, signs in table.items() if len(signs) >= 15}
    assert len(common) >= 4, sorted(common)
    for opening, signs in common.items():
        assert all(signs[s] >= 0.15 * signs.total() for s in (-1, 0, 1)), (opening, signs)


def test_the_name_is_spelled_one_way():
    texts = [m["content"] for name in KINDS for _, _, messages in conversations(name) for m in messages]
    texts += [t for name in ("prompts", "prompts_heldout", "panel") for t in first_questions(name)]
    found = Counter(word for t in texts for word in re.findall(r"[A-Za-z]*pixiu[A-Za-z]*", t, re.I))
    assert set(found) == {"Pixiu", "ChatPiXiu"}, found
    identity = " ".join(t for _, kind, t in answers("sft") if kind == "identity")
    assert len(re.findall(r"\bPixiu\b", identity)) >= 15
    assert "貔貅" in identity and sum("貔貅" in t for _, kind, t in answers("sft") if kind == "chinese") >= 5
    # Nobody else's name may be claimed.
    assert not re.search(r"\bI am (ChatGPT|Claude|Gemini|SmolLM)|trained by (OpenAI|Hugging)", identity)


def test_panel_shows_what_the_readme_says():
    panel = first_questions("panel")
    assert sum(bool(CHINESE.search(t)) for t in panel) == 1, panel
    assert panel[-1] == "你好，请介绍一下你自己。" and "capital of France" in panel[2]


def test_readme_counts_equal_the_files():
    text = (DEMO / "README.md").read_text(encoding="utf-8")
    stated = {name: int(n) for name, n in re.findall(r"^\| `(\w+)\.jsonl` \| (\d+) \|", text, re.M)}
    assert stated == {path.stem: len(read(path.stem)) for path in DEMO.glob("*.jsonl")}
    for name, kinds in KINDS.items():
        rows = conversations(name)
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}.jsonl`"))
        stated = [int(n) for n in re.findall(r"(\d+) (?:identity|facts|opinion|chinese|with )", line)]
        users = [sum(m["role"] == "user" for m in messages) for _, _, messages in rows]
        actual = [Counter(kind for _, kind, _ in rows)[kind] for kind in kinds]
        actual += [sum(n > 1 for n in users), sum(m[0]["role"] == "system" for _, _, m in rows)]
        assert stated == actual, f"{name}: README says {stated}, the file has {actual}"
    assert "MIT" in text
