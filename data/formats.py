"""Any json, jsonl or text file of conversations, comparisons or prompts, without registration.

    read_sft(path)          {"messages": [{"role", "content"}, ...]}  or  {"text": ...}
    read_preferences(path)  {"prompt": [messages], "answers": [best, ..., worst]}
    read_prompts(path)      {"prompt": [messages]}

The format is recognised by the keys of the first row, and reported. Every row knows its file and line. A row that does
not fit is an error that names them, what was found and what was expected; with skip_bad it is counted instead. What is
left out for other reasons (empty answers, ties, identical answers) is counted and printed too.
"""
import difflib
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from common import UserError

ROLES = {"user": "user", "human": "user", "prompter": "user", "question": "user", "system": "system",
         **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")}
ASK = ("prompt", "question", "query", "input")                     # names under which people store a prompt ...
ANSWER = ("completion", "response", "answer", "output", "reply")   # ... and an answer
ANSWERS = ("answers", "responses", "completions", "candidates", "ranking", "output")
TALKS = ("messages", "conversations", "conversation")


class BadRow(ValueError):
    """What is wrong with one row; the reader adds file and line."""


class LeftOut(Exception):
    """A row that is well-formed and teaches nothing; the reader counts the reason."""


class Rows(list):
    """The rows of a file, and what happened on the way: report = {"file", "format", "rows", reason: count, ...}."""
    def __init__(self, rows=(), report: dict | None = None):
        super().__init__(rows)
        self.report = report or {}

    def print_report(self) -> None:
        counts = [f"{n} {what}" for what, n in self.report.items() if what not in ("file", "format", "rows") and n]
        print(f"{self.report['file']}: {len(self)} rows, format {self.report['format']}" +
              (f" ({', '.join(counts)})" if counts else ""))


# ---------------------------------------------------------------- rows of a file

def text_of(path: Path) -> str:
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")])
        raise UserError(f"no file {path}" + (f"; that folder has {', '.join(near)}" if near else ""))
    if path.is_dir():
        raise UserError(f"{path} is a folder, name one file of it: "
                        f"{', '.join(sorted(p.name for p in path.iterdir())[:5])}")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return data.decode("utf-8-sig")                            # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte {data[error.start]:#x} is not UTF-8: save the file as UTF-8 (was it "
                        "GBK?)") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from None


def items(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """(file:line, row) of a JSON array, of one object that holds an array, or of JSON lines."""
    start = text.lstrip()[:1]
    if start == "[":
        yield from array_items(path, text, text.index("["))
        return
    first = next((line for line in text.splitlines() if line.strip()), "")
    if start == "{" and not complete(first) and complete(text):
        whole = json.loads(text)
        lists = [(k, v) for k, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], (dict, str))]
        if len(lists) == 1 and lists[0][0] not in (*TALKS, *ANSWERS):
            yield from ((f"{path}[{lists[0][0]!r}][{i}]", row) for i, row in enumerate(lists[0][1]))
        else:
            yield f"{path}:1", whole
        return
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{n}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{n}", BadRow(f"no JSON ({error}): {line.strip()[:60]!r}")


def complete(text: str) -> bool:
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def array_items(path: Path, text: str, at: int) -> Iterator[tuple[str, object]]:
    """Item by item, so that each knows its line. A broken item ends the file: what follows cannot be told apart."""
    decoder, blank, line, counted = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    at += 1
    while True:
        at = blank.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text) or text[at] == "]":
            if at >= len(text):
                yield f"{path}:{line}", BadRow("the file ends inside its list: it is incomplete")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{line}", BadRow(f"no JSON ({error}), and nothing behind it can be read")
            return
        yield f"{path}:{line}", row


# ---------------------------------------------------------------- conversations

def string(value, what: str) -> str:
    """A text; OpenAI's list of parts is joined."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(p["text"] for p in value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, expected a text")
    return value


def conversation(value, what: str, counts: Counter) -> list[dict]:
    """Messages of any dialect -> user and assistant in turn, at most one system message, first. Real dialogues break
    these rules; what is put right is counted."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} is {'empty' if value == [] else type(value).__name__}, expected a list of messages")
    out: list[dict] = []
    for i, m in enumerate(value):
        if not isinstance(m, dict):
            raise BadRow(f"{what}[{i}] is {type(m).__name__}, expected an object with role and content (or from and "
                         "value)")
        key = "role" if "role" in m else "from"
        name = m.get(key)
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise BadRow(f"{what}[{i}].{key} is {name!r}, expected one of {', '.join(sorted(ROLES))}")
        role, text = ROLES[name.lower()], string(m.get("content", m.get("value", m.get("text"))),
                                                 f"{what}[{i}].content")
        if not text.strip():
            counts["empty turns removed"] += 1
        elif role == "assistant" and not any(x["role"] == "user" for x in out):
            counts["answers without a question removed"] += 1  # ShareGPT rows that begin in the middle of a dialogue
        elif out and out[-1]["role"] == role:
            out[-1] = {"role": role, "content": out[-1]["content"] + "\n\n" + text}
            counts["neighbouring turns of one speaker joined"] += 1
        elif role == "system" and out:
            counts["late system messages removed"] += 1
        else:
            out.append({"role": role, "content": text})
    return out


def talk_of(row: dict, counts: Counter) -> list[dict]:
    key = next(k for k in TALKS if k in row)
    messages = conversation(row[key], key, counts)
    if isinstance(row.get("system"), str) and row["system"].strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def asked(row: dict, counts: Counter) -> list[dict]:
    """The prompt of a row, whatever it is called; alpaca's input stands below the instruction."""
    if any(k in row for k in TALKS):
        return talk_of(row, counts)
    if "instruction" in row:
        question = string(row["instruction"], "instruction")
        given = row.get("input", row.get("context")) or ""
        question += "\n\n" + string(given, "input") if given else ""
    else:
        key = next((k for k in ASK if k in row), None)
        if key is None:
            raise BadRow(f"no prompt: it has {keys_of(row)}, expected instruction or one of {', '.join(ASK)}")
        if isinstance(row[key], list):
            return conversation(row[key], key, counts)
        question = string(row[key], key)
    if not question.strip():
        raise LeftOut("empty prompts left out")
    messages = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.append({"role": "system", "content": row["system"]})
    for i, pair in enumerate(row.get("history") or []):            # earlier turns: [[question, answer], ...]
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history[{i}] is {str(pair)[:40]!r}, expected [question, answer]")
        messages += [{"role": role, "content": string(text, f"history[{i}]")}
                     for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*messages, {"role": "user", "content": question}]


def keys_of(row: dict) -> str:
    return ", ".join(map(str, list(row)[:8])) or "no keys"


# ---------------------------------------------------------------- SFT

def sft_talk(row: dict, counts: Counter) -> dict:
    messages = talk_of(row, counts)
    if not any(m["role"] == "assistant" for m in messages):
        raise LeftOut("without an answer left out")
    return {"messages": messages}


def sft_pair(row: dict, counts: Counter) -> dict:
    key = next(k for k in ANSWER if k in row)
    answer = row[key]
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        answer = conversation([{"role": "user", "content": "-"}, *answer], key, counts)[-1]["content"]
    if isinstance(answer, list) and answer and all(isinstance(a, str) for a in answer):
        answer = answer[0]                                         # a ranked list: the best one
        counts["best of several answers taken"] += 1
    answer = string(answer, key)
    if not answer.strip():
        raise LeftOut("empty answers left out")
    return {"messages": [*asked(row, counts), {"role": "assistant", "content": answer}]}


def sft_instances(row: dict, counts: Counter) -> dict:
    """Self-Instruct's seeds: one instruction, a list of {"input", "output"}; the first one is taken."""
    if not isinstance(row["instances"], list) or not row["instances"] or not isinstance(row["instances"][0], dict):
        raise BadRow("instances is no list of objects")
    return sft_pair({"instruction": row.get("instruction"), **row["instances"][0]}, counts)


def sft_chosen(row: dict, counts: Counter) -> dict:
    found = comparison(row, counts)
    return {"messages": [*found["prompt"], {"role": "assistant", "content": found["answers"][0]}]}


def sft_text(row: dict, counts: Counter) -> dict:
    if not (text := string(row["text"], "text")).strip():
        raise LeftOut("empty texts left out")
    return {"text": text}


# name -> (is this row one of them?, how to read it). The first that says yes is the format of the file.
Format = tuple[Callable[[dict], bool], Callable[[dict, Counter], dict]]
SFT: dict[str, Format] = {
    "comparisons, the chosen answer": (lambda r: "chosen" in r and "rejected" in r and not any(k in r for k in ANSWER),
                                       sft_chosen),
    "messages": (lambda r: "messages" in r, sft_talk),
    "sharegpt": (lambda r: any(k in r for k in TALKS), sft_talk),
    "self-instruct": (lambda r: "instances" in r, sft_instances),
    "alpaca": (lambda r: "instruction" in r and any(k in r for k in ANSWER), sft_pair),
    "prompt-completion": (lambda r: any(k in r for k in ASK) and any(k in r for k in ANSWER if k in r), sft_pair),
    "text": (lambda r: "text" in r, sft_text)}


# ---------------------------------------------------------------- preferences

def dialogue(text: str, what: str) -> list[dict]:
    """HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise BadRow(f"{what} does not begin with 'Human:': {text[:40]!r}")
    return [{"role": ROLES["human" if who == "Human" else "assistant"], "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def is_dialogue(row: dict) -> bool:
    return all(isinstance(row.get(k), str) and "Human:" in row[k] and "Assistant:" in row[k]
               for k in ("chosen", "rejected"))


def comparison(row: dict, counts: Counter) -> dict:
    """chosen / rejected: HH-RLHF dialogues, whole conversations, or answers beside a prompt."""
    if is_dialogue(row) and not any(k in row for k in (*ASK, "instruction", *TALKS)):
        sides = [conversation(dialogue(row[k], k), k, counts) for k in ("chosen", "rejected")]
    else:
        sides = [row[k] if isinstance(row[k], str) else conversation(unwrapped(row[k]), k, counts)
                 for k in ("chosen", "rejected")]
    own = any(k in row for k in (*ASK, "instruction", *TALKS))
    if own:
        prompt = asked(row, counts)
        answers = [s if isinstance(s, str) else s[-1]["content"] if s else "" for s in sides]
    elif all(isinstance(s, list) for s in sides):
        a, b = sides
        if not a or not b or a[-1]["role"] != "assistant" or b[-1]["role"] != "assistant":
            raise LeftOut("without an answer left out")
        if a[:-1] != b[:-1]:
            raise LeftOut("whose two dialogues differ before their last answer left out")
        prompt, answers = a[:-1], [a[-1]["content"], b[-1]["content"]]
    else:
        raise BadRow(f"chosen and rejected without a prompt: it has {keys_of(row)}, expected prompt or instruction "
                     "beside them")
    return ranked(prompt, answers, counts)


def unwrapped(value):
    """An answer alone, {"from": "gpt", "value": ...} or a list that begins with one, gets a question in front, so that
    `conversation` does not take it for an answer without one."""
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        name = turns[0].get("role", turns[0].get("from"))
        if isinstance(name, str) and ROLES.get(name.lower()) == "assistant":
            return [{"role": "user", "content": "-"}, *turns]
    return turns


def paired(row: dict, counts: Counter) -> dict:
    """StackExchange pairs: response_j was rated higher than response_k."""
    return ranked(asked(row, counts), [string(row[k], k) for k in ("response_j", "response_k")], counts)


def inner(answer):
    """The text of an answer that is an object."""
    names = ("text", "content", "value", *ANSWER)
    return next((answer[k] for k in names if k in answer), None) if isinstance(answer, dict) else answer


def listed(row: dict, counts: Counter) -> dict:
    """Several answers, best first, or with a score (higher is better) or rank (lower is better) each."""
    key = next(k for k in ANSWERS if isinstance(row.get(k), list))
    answers = row[key]
    texts = [string(inner(a), f"{key}[{i}]") for i, a in enumerate(answers)]
    grades, name = None, next((k for k in ("scores", "ratings", "ranks") if isinstance(row.get(k), list)), None)
    if name:
        grades = row[name]
    elif answers and isinstance(answers[0], dict):
        name = next((k for k in ("score", "rating", "rank") if k in answers[0]), None)
        grades = [a.get(name) for a in answers] if name else None
    if grades is not None:
        if len(grades) != len(texts) or not all(isinstance(g, (int, float)) for g in grades):
            raise BadRow(f"{name} has {grades}, expected one number for each of the {len(texts)} answers")
        sign = 1 if name.startswith("rank") else -1
        order = sorted(range(len(texts)), key=lambda i: sign * grades[i])
        distinct = [i for n, i in enumerate(order) if n == 0 or grades[i] != grades[order[n - 1]]]
        counts["tied answers left out"] += len(order) - len(distinct)
        texts = [texts[i] for i in distinct]
    return ranked(asked({k: v for k, v in row.items() if k != key or key == "messages"}, counts), texts, counts)


def ranked(prompt: list[dict], answers: list[str], counts: Counter) -> dict:
    while prompt and prompt[-1]["role"] == "assistant":            # an answer is about to follow
        prompt = prompt[:-1]
    if not any(m["role"] == "user" for m in prompt):
        raise LeftOut("without a question left out")
    distinct = list(dict.fromkeys(a for a in answers if a.strip()))
    counts["empty or repeated answers left out"] += len(answers) - len(distinct)
    if len(distinct) < 2:
        raise LeftOut("with fewer than two different answers left out")
    return {"prompt": prompt, "answers": distinct}


PREFERENCES: dict[str, Format] = {
    "hh-rlhf": (lambda r: is_dialogue(r) and not any(k in r for k in ASK), comparison),
    "chosen-rejected": (lambda r: "chosen" in r and "rejected" in r, comparison),
    "paired": (lambda r: "response_j" in r and "response_k" in r, paired),
    "ranked list": (lambda r: any(isinstance(r.get(k), list) for k in ANSWERS), listed)}


# ---------------------------------------------------------------- prompts

def prompt_only(row: dict, counts: Counter) -> dict:
    """The question of any row: what the assistant said last is left away, it is what the policy will say."""
    if is_dialogue(row):
        prompt = conversation(dialogue(row["chosen"], "chosen"), "chosen", counts)
    elif "text" in row and not any(k in row for k in (*TALKS, *ASK, "instruction")):
        prompt = [{"role": "user", "content": string(row["text"], "text")}]
    elif isinstance(row.get("chosen"), list) and not any(k in row for k in (*TALKS, *ASK, "instruction")):
        prompt = conversation(row["chosen"], "chosen", counts)
    elif isinstance(row.get("instances"), list) and row["instances"] and isinstance(row["instances"][0], dict):
        prompt = asked({**row, "input": row["instances"][0].get("input")}, counts)
    else:
        prompt = asked(row, counts)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt or not prompt[-1]["content"].strip():
        raise LeftOut("empty prompts left out")
    return {"prompt": prompt}


def any_prompt(row: dict) -> bool:
    return any(k in row for k in (*TALKS, *ASK, "instruction", "text", "chosen"))


PROMPTS: dict[str, Format] = {
    "prompt": (lambda r: "prompt" in r, prompt_only),
    **{name: (match, prompt_only) for name, (match, _) in {**PREFERENCES, **SFT}.items()},
    "a question alone": (any_prompt, prompt_only)}


# ---------------------------------------------------------------- reading

def read(path: str | Path, formats: dict[str, Format], name: str, skip_bad: bool, plain: Callable | None) -> Rows:
    """Rows of the file in the format given or recognised, each with its place and the keys that were not needed."""
    path = Path(path)
    text = text_of(path)
    if name != "auto" and name not in formats:
        raise UserError(f"--format {name} is not known here; known: auto, {', '.join(formats)}")
    source = plain(path, text) if plain and not text.lstrip().startswith(("{", "[")) else items(path, text)
    rows, counts, bad, found = [], Counter(), [], name if name != "auto" else ""
    for where, row in source:
        try:
            if isinstance(row, BadRow):
                raise row
            row = {"prompt": row} if isinstance(row, str) and "prompt" in formats else row
            if not isinstance(row, dict):
                raise BadRow(f"a {type(row).__name__}, expected an object")
            if not found:
                found = sniff(row, formats)
            if not formats[found][0](row):
                raise BadRow(f"it has {keys_of(row)}, which is not the format of this file ({found})")
            new = formats[found][1](row, counts)
            extra = {k: v for k, v in row.items() if k not in USED}
            rows.append({**new, "where": where, **({"extra": extra} if extra else {})})
        except LeftOut as reason:
            counts[str(reason)] += 1
        except BadRow as error:
            if not skip_bad:
                raise UserError(f"{where}: {error}. --skip_bad counts such rows and goes on") from None
            bad.append(f"{where}: {error}")
    for line in bad[:3]:
        print(f"skipped {line}")
    if not rows:
        what = ", ".join(f"{n} {k}" for k, n in [*counts.items(), ("bad rows", len(bad))] if n) or "the file is empty"
        raise UserError(f"{path} holds nothing to learn from: {what}")
    return Rows(rows, {"file": str(path), "format": found, "rows": len(rows), "bad rows skipped": len(bad), **counts})


USED = {*TALKS, *ASK, *ANSWER, *ANSWERS, "instruction", "instances", "text", "chosen", "rejected", "response_j",
        "response_k",
        "history", "context", "system", "scores", "ratings", "ranks"}


def sniff(row: dict, formats: dict[str, Format]) -> str:
    name = next((name for name, (match, _) in formats.items() if match(row)), None)
    if name is None:
        sample = json.dumps(row, ensure_ascii=False)
        raise BadRow(f"no known format: the first row has {keys_of(row)}; known are {', '.join(formats)}. "
                     f"The row: {sample[:160]}{' ...' if len(sample) > 160 else ''}")
    return name


def documents(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """A text file: documents between blank lines."""
    line = 1
    for part in re.split(r"(\n\s*\n)", text):
        if part.strip():
            yield f"{path}:{line}", {"text": part.strip("\n")}
        line += part.count("\n")


def lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """A text file: a prompt per line."""
    return ((f"{path}:{n}", {"prompt": line}) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def read_sft(path: str | Path, format: str = "auto", skip_bad: bool = False) -> Rows:
    """Conversations: OpenAI messages, ShareGPT, alpaca, self-instruct, prompt/completion, text (also .txt)."""
    return read(path, SFT, format, skip_bad, documents)


def read_preferences(path: str | Path, format: str = "auto", skip_bad: bool = False) -> Rows:
    """Comparisons: chosen/rejected in any dialect, HH-RLHF, ranked lists, answers with scores."""
    return read(path, PREFERENCES, format, skip_bad, None)


def read_prompts(path: str | Path, format: str = "auto", skip_bad: bool = False) -> Rows:
    """Prompts alone, or those of any other format; a .txt holds one per line."""
    return read(path, PROMPTS, format, skip_bad, lines)
