"""Conversations to (ids, mask) in one pass: mask 1 = what the assistant said, and the end token with which it stopped.

A format is a list of pieces (text, kind). Neighbours of one mask are encoded together, as the model was trained; where
the mask changes from prompt to answer there is a cut that nothing merges across. Nothing is tokenised twice and nothing
is found by subtracting lengths, so the ids of a prompt are always a prefix of the ids of prompt + answer.

    chatml   <|im_start|>user\\n Hi <|im_end|>\\n <|im_start|>assistant\\n Hello <|im_end|> \\n
    mask                    0     0      0                   0              1       1      0

Pieces of the format may name special tokens; what people wrote may not: "<|im_end|>" typed by a user is encoded as
plain text. A Jinja template (of tokenizer_config.json or a GGUF file) is rendered with marks in place of the words,
split at the marks, and then treated like any other list of pieces.
"""
import datetime
import functools
import json
import re

from common import UserError
from data.chat_formats import (
    ALPACA,
    ROWS,
    VICUNA,
    A,
    E,
    F,
    J,
    S,
    U,
    alpaca,
    chatglm,
    chatglm2,
    chatglm3,
    chatml,
    escaped,
    glm4,
    llama2,
    llama3,
    vicuna,
    zephyr,
)

__all__ = ["ALPACA", "FORMATS", "VICUNA", "check_format", "guess", "next_question", "render", "use_format"]

FORMATS = {"chatml": chatml, "alpaca": alpaca, "vicuna": vicuna, "llama2": llama2, "llama3": llama3, "zephyr": zephyr,
           "chatglm": chatglm, "chatglm2": chatglm2, "chatglm3": chatglm3, "glm4": glm4, **ROWS}
ABOUT = {"chatml": "many: Qwen, Yi, InternLM2, SmolLM", "alpaca": "Alpaca, Dolly v1, MPT-Instruct, most LoRA projects",
         "vicuna": "Vicuna v1.1 and later", "llama2": "Llama-2-Chat", "llama3": "Llama-3-Instruct", "zephyr": "Zephyr",
         "chatglm": "ChatGLM-6B", "chatglm2": "ChatGLM2-6B", "chatglm3": "ChatGLM3-6B", "glm4": "GLM-4-9B-Chat"}

# A model that brings no template: what its tokens tell (all of a row must be there), then what its name tells (of two
# that fit, the first). Only systems of one format each; None where a name looks like another's.
BY_TOKENS = ((("<|MOSS|>", "<eom>"), "moss"), (("<eoh>", "<eoa>"), "internlm"), (("### End",), "dolly"),
             (("<|USER|>", "<|ASSISTANT|>"), "stablelm"), (("<start_of_turn>", "<end_of_turn>"), "gemma"))
BY_NAME = tuple((word, name) for name, words in (
    ("chatglm3", "chatglm3"), ("chatglm2", "chatglm2 codegeex2"), ("chatglm", "chatglm-6b"), ("glm4", "glm-4-9b-chat"),
    ("moss", "moss-moon"), ("dolly", "dolly-v2"), ("openchatkit", "gpt-neoxt-chat"), ("redpajama", "incite-chat "
     "redpajama-incite-7b-chat"), ("belle", "belle-7b belle-llama"), ("billa", "billa-7b-sft"), (None, "stable-vicuna"),
    ("alpaca", "chinese-vicuna"), ("vicuna_v0", "vicuna-7b-delta-v0 vicuna-13b-delta-v0"), ("vicuna", "vicuna"),
    ("koala", "koala-7b koala-13b"), ("oasst_llama", "oasst-rlhf-2-llama oasst-sft-6-llama oasst-sft-7-llama"),
    ("oasst", "oasst-sft oasst-rm"), ("stablelm", "stablelm-tuned-alpha"), ("baize", "baize-"),
    ("phoenix", "phoenix-chat phoenix-inst chimera-chat chimera-inst"), ("falcon_chat", "falcon-180b-chat"),
    ("falcon", "falcon-7b-instruct falcon-40b-instruct"), ("baichuan", "baichuan2-7b-chat baichuan2-13b-chat"),
    ("baichuan1", "baichuan-13b-chat"), ("internlm", "internlm-chat"), ("chinese_alpaca2", "chinese-alpaca-2"),
    ("chinese_alpaca", "chinese-alpaca"), ("chatyuan", "chatyuan-large"), ("firefly", "firefly-7b firefly-baichuan "
     "firefly-bloom firefly-internlm firefly-llama"), ("guanaco", "guanaco-7b guanaco-13b guanaco-33b guanaco-65b"),
    ("huatuo", "huatuo-llama"), ("robin", "robin-7b robin-13b robin-33b robin-65b"), ("wizardlm", "wizardlm-7b"),
    ("ziya", "ziya-llama"), ("chatrwkv", "rwkv-4-raven rwkv-raven"), ("rwkv_world", "rwkv-4-world rwkv-5-world"),
    ("plain", "bloomz mt0"), ("gpt4all", "gpt4all-j gpt4all-13b"), ("mpt", "mpt-7b-chat"),
    ("starchat", "starchat-alpha starchat-beta"), ("aquila", "aquilachat-7b"), ("h2ogpt", "en-2048-open-llama"),
    ("deepseek_coder", "deepseek-coder-1.3b-instruct deepseek-coder-6.7b-instruct deepseek-coder-33b-instruct"),
    ("deepseek", "deepseek-llm-7b-chat deepseek-llm-67b-chat"),
    ("qwen", "qwen-7b-chat qwen-14b-chat qwen-72b-chat qwen-1-8b-chat"))
    for word in words.split())


def guess(name: str, tokenizer=None) -> str | None:
    """The format of a public model, by the tokens of its vocabulary or by its name: "THUDM/chatglm-6b" -> "chatglm";
    None where that is not certain."""
    if tokenizer is not None:
        for tokens, found in BY_TOKENS:
            if all(t in tokenizer.named for t in tokens):
                return found
    name = re.sub("[ _]", "-", name.lower())
    return next((found for word, found in BY_NAME if word in name), None)


def listing() -> str:
    """Every format, one a line."""
    about = ABOUT | {name: row.about for name, row in ROWS.items()}
    return "\n".join(f"  {name:16} {about[name]}" for name in FORMATS)


def check_format(name: str) -> None:
    if name and name not in FORMATS:
        what = "--template takes one of" if name == "help" else f"--template {name} is unknown; known"
        raise UserError(f"{what}:\n{listing()}")


def use_format(tokenizer, name: str = "") -> str:
    """Takes the format of this name, or the model's own, or where it has none what `guess` is certain of, or chatml (if
    its tokens exist), or alpaca. Its end token becomes one of the tokenizer's: a base model must stop at <|im_end|>."""
    if tokenizer is None:
        raise UserError("this model has no tokenizer: put tokenizer.json or tokenizer.model beside its weights")
    check_format(name)
    default = "chatml" if "<|im_start|>" in tokenizer.specials else "alpaca"
    guessed = guess(tokenizer.origin, tokenizer)
    tokenizer.chat_template = name or tokenizer.chat_template or guessed or default
    ids, mask = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    end = [i for i, supervised in zip(ids, mask) if supervised][-1]
    if end not in tokenizer.eos_ids:
        tokenizer.eos_ids.insert(0, end)
    return tokenizer.chat_template


def next_question(name: str) -> str:
    """What a model writes behind its answer if its format taught it no end token: the beginning of the next question.
    "chatrwkv" -> "\\nBob:"; "" where an end token is certain."""
    row = ROWS.get(name)
    if row is None or row.history_end:
        return ""
    text = (row.between + row.user.partition("{}")[0]).rstrip()
    return "\n" * text.startswith("\n") + text.lstrip("\n")


# ---------------------------------------------------------------- rendering

def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Messages -> (ids, mask). With add_generation_prompt the ids end where the assistant's next words begin."""
    check(messages)
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"this model names no chat format: pass --template with one of {', '.join(FORMATS)}")
    if template in FORMATS:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = [(m["role"], m["content"]) for m in messages if m["role"] != "system"]
        pieces = FORMATS[template](system, turns, add_generation_prompt)
    elif "{" in template:
        pieces = jinja_pieces(tokenizer, template, messages, add_generation_prompt)
    else:
        raise UserError(f"unknown chat format {template!r}; known: {', '.join(FORMATS)}, or a Jinja template")
    return encode_pieces(tokenizer, pieces)


def encode_pieces(tokenizer, pieces: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Text runs until the next special token or until supervision changes, as in the model's own training; each run is
    encoded once. Exactly one BOS, if the tokenizer uses one."""
    runs: list[list] = []                                 # [text or id, mask]
    for text, kind in pieces:
        supervised = int(kind in (A, E, S))
        for part in end_ids(tokenizer, text) if kind == E else tokenizer.split(text, special=kind in (F, S, J)):
            if kind == J and runs and isinstance(part, int) and runs[-1][0] == part:
                continue                                  # the end of an answer is the beginning of a question
            if isinstance(part, str) and runs and isinstance(runs[-1][0], str) and runs[-1][1] == supervised:
                runs[-1][0] += part
            else:
                runs.append([part, supervised])
    ids: list[int] = []
    mask: list[int] = []
    start = True                                          # whether the tokenizer may put its space in front
    for part, supervised in runs:
        new = [part] if isinstance(part, int) else tokenizer.encode(part, start=start)
        ids += new
        mask += [supervised] * len(new)
        start = tokenizer.space_after and isinstance(part, int)
    if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
        ids, mask = [tokenizer.bos_id, *ids], [0, *mask]
    return ids, mask


def end_ids(tokenizer, text: str) -> list[int]:
    """The end of an assistant's turn: the named token, or where the vocabulary has none the tokenizer's own."""
    if text and text in tokenizer.specials:
        return [tokenizer.specials[text]]
    if not tokenizer.eos_ids:
        raise UserError("the tokenizer has no end token, so no answer could be taught to end: set eos_token in "
                        "tokenizer_config.json")
    return tokenizer.eos_ids[:1]


def check(messages: list[dict]) -> None:
    """A conversation that can be rendered, or an error that says which message is wrong."""
    if not messages:
        raise UserError("an empty conversation cannot be rendered")
    for i, m in enumerate(messages):
        if m.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"messages[{i}].role is {m.get('role')!r}, expected system, user or assistant")
        if not isinstance(m.get("content"), str):
            raise UserError(f"messages[{i}].content is {type(m.get('content')).__name__}, expected a string")
        if m["role"] == "system" and i:
            raise UserError(f"messages[{i}] is a system message; it may only stand first")
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if not roles or roles[0] != "user":
        raise UserError(f"a conversation starts with the user, this one with {roles[0] if roles else 'nothing'}")
    for i, (a, b) in enumerate(zip(roles, roles[1:])):
        if a == b:
            raise UserError(f"messages {i} and {i + 1} (not counting system) are both from the {a}: roles must "
                            "alternate")


# ---------------------------------------------------------------- Jinja

MARK = "\ue000{}\ue001"                   # stands for the words of message {}; letters, so that templates see words


def jinja_pieces(tokenizer, template: str, messages: list[dict], prompt: bool) -> list[tuple[str, str]]:
    """Renders the template twice. With marks in place of the words it tells where they stand; with the words, what it
    makes of them (some trim). What is written before an answer is cut where the prompt ends."""
    names = special_names(tokenizer)

    def show(rows: list[dict], opened: bool) -> str:
        return render_template(template, names, rows, opened) + (unasked_opening(template, names) if opened else "")

    # A blank question has no words to protect, and templates that strip would strip their own text around it.
    marked = [{**m, "content": MARK.format(i) if m["content"].strip() or m["role"] == "assistant" else m["content"]}
              for i, m in enumerate(messages)]
    parts = re.split("\ue000(\\d+)\ue001", show(marked, prompt))           # format, number, format, number, ... format
    words = what_is_printed(messages, parts, show(messages, prompt))
    pieces, shown = [(parts[0], F)], parts[0]
    opens = [before for before, i in zip(parts[::2], parts[1::2]) if messages[int(i)]["role"] == "user"]
    for number, content, text in zip(map(int, parts[1::2]), words, parts[2::2]):
        if messages[number]["role"] == "assistant":
            if number < len(messages) - 1 and not ends_turn(tokenizer, text, opens):
                pieces += [(content, U), (text, F)]       # an earlier answer without an end: part of the prompt
                shown += MARK.format(number) + text
                continue
            opening, said = pieces.pop()[0] if pieces[-1][1] == F else "", ""
            ends = show(marked[:number], True)
            if shown.startswith(ends) and len(shown) - len(ends) <= len(opening):
                opening, said = opening[:len(opening) - len(shown) + len(ends)], shown[len(ends):]
            elif number == len(messages) - 1:             # the template writes history otherwise than it prompts
                return jinja_pieces(tokenizer, template, messages[:-1], True) + answer(tokenizer, content, text)
            pieces += [(opening, F), (said, S), *answer(tokenizer, content, text)]
        else:
            pieces += [(content, U), (text, F)]
        shown += MARK.format(number) + text
    return pieces


def what_is_printed(messages: list[dict], parts: list[str], text: str) -> list[str]:
    """The words of each mark as the template printed them: as they are, with blanks or newlines taken off, or with
    newlines as \\n."""
    at, words, numbers = len(parts[0]), [], [int(n) for n in parts[1::2]]
    for i, m in enumerate(messages):
        n = numbers.count(i)
        if n != 1 and (m["role"] == "assistant" or (n == 0 and m["content"].strip())):
            raise UserError(f"the chat template prints messages[{i}] ({m['role']}) {n} times, expected exactly once. "
                            f"Pass --template with one of {', '.join(FORMATS)}")
    for number, behind in zip(numbers, parts[2::2]):
        c = messages[number]["content"]
        ways = (c, c.strip(), c.rstrip(), c.lstrip(), c.strip("\n"), c.rstrip("\n"), c.lstrip("\n"), escaped(c))
        words += [w for w in ways if text.startswith(w + behind, at)][:1] or [None]
        if words[-1] is None:
            break
        at += len(words[-1]) + len(behind)
    if None in words or at != len(text) or not text.startswith(parts[0]):
        number = numbers[len(words) - 1] if words else 0
        raise UserError(f"the chat template rewrites messages[{number}], {messages[number]['content'][:40]!r}, so it "
                        f"is unclear what to supervise. Pass --template with one of {', '.join(FORMATS)}")
    return words


def ends_turn(tokenizer, behind: str, opens: list[str]) -> bool:
    """Whether what stands behind an earlier answer ends it. A token that opens a question (Baichuan) does so only where
    generation stops at it (ChatGLM3)."""
    end = special_at(tokenizer, behind.lstrip())
    opener = end is not None and any(text.rstrip().endswith(end) for text in opens)
    return not behind or (end is not None and (not opener or tokenizer.specials[end] in tokenizer.eos_ids))


def special_at(tokenizer, text: str) -> str | None:
    """The special token, the longest of several, that a text begins with."""
    return max((s for s in tokenizer.specials if text.startswith(s)), key=len, default=None)


def answer(tokenizer, words: str, behind: str) -> list[tuple[str, str]]:
    """An answer and what the template prints behind it: first the end token, which is supervised; the rest is not."""
    blank = len(behind) - len(behind.lstrip())
    end = special_at(tokenizer, behind[blank:])
    if not behind:
        return [(words, A), ("", E)]
    if end is None:
        raise UserError(f"the chat template prints {behind[:20]!r} behind an answer, no special token: the model could "
                        "not learn to stop. Pass --template")
    return [(words + behind[:blank], A), (end, E), (behind[blank + len(end):], F)]


@functools.lru_cache(maxsize=16)
def unasked_opening(template: str, names: tuple) -> str:
    """What a template that knows no add_generation_prompt prints between a question and its answer; else nothing."""
    rows = [{"role": "user", "content": MARK.format(0)}, {"role": "assistant", "content": MARK.format(1)}]
    try:
        asked, unasked, whole = (render_template(template, names, *how) for how in
                                 ((rows[:1], True), (rows[:1], False), (rows, False)))
    except UserError:                                     # it wants a system message, say: the real rows will tell
        return ""
    opening = whole.partition(MARK.format(1))[0].removeprefix(unasked).rstrip(" ")
    return opening if asked == unasked and whole.startswith(unasked) else ""


@functools.lru_cache(maxsize=16)
def compiled(template: str):
    """A template that came with a model is foreign code, hence the sandbox. Compiling it takes longer than using it."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):                          # {% generation %} marks answers; the markers do that already
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str):
        raise UserError(f"the chat template refuses this conversation: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals.update(raise_exception=raise_exception,
                       strftime_now=lambda form: datetime.datetime.now().strftime(form))
    return env.from_string(template)


def special_names(tokenizer) -> tuple[tuple[str, str], ...]:
    """What templates call bos_token, eos_token and pad_token."""
    eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    ids = {"bos": tokenizer.bos_id, "eos": eos, "pad": tokenizer.pad_id}
    return tuple((f"{name}_token", tokenizer.token_of.get(i, "")) for name, i in ids.items())


def render_template(template: str, names: tuple, messages: list[dict], add_generation_prompt: bool) -> str:
    """The text of a conversation. Whatever goes wrong in foreign code is the template's fault and told as such."""
    try:
        return compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                         documents=None, **dict(names))
    except UserError:
        raise
    except Exception as error:  # a sandbox lets through OverflowError, TypeError and others
        raise UserError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from None
