"""Conversations to (ids, mask) in one pass: mask 1 = what the assistant said, and the end token with which it stopped.

A format is a list of pieces (text, supervised), and ids are built piece by piece: each piece is encoded once and brings
its mask with it. Nothing is tokenised twice and nothing is found by subtracting lengths, so the ids of a prompt are
always a prefix of the ids of prompt + answer, whatever a tokenizer would merge across the border.

    chatml   <|im_start|>user\\n Hi <|im_end|>\\n <|im_start|>assistant\\n Hello <|im_end|> \\n
    mask                    0     0      0                   0              1       1      0

Pieces of the format may name special tokens; what people wrote may not: "<|im_end|>" typed by a user is encoded as
plain text. A Jinja template (of tokenizer_config.json or a GGUF file) is rendered with markers in place of the
contents, split at the markers, and then treated like any other list of pieces.
"""
import datetime
import functools
import json
import re

from common import UserError

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

# A piece is (text, kind): F = text of the format (may name special tokens), U = somebody's words, A = the assistant's
# words
# (supervised), E = the end of its turn (supervised, may name a special token; "" = the tokenizer's own end token).
F, U, A, E = "format", "user", "answer", "end"


# ---------------------------------------------------------------- built-in formats

def chatml(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = [("<|im_start|>system\n", F), (system, U), ("<|im_end|>\n", F)] if system else []
    for role, text in turns:
        pieces += [(f"<|im_start|>{role}\n", F)]
        pieces += [(text, U), ("<|im_end|>\n", F)] if role == "user" else [(text, A), ("<|im_end|>", E), ("\n", F)]
    return pieces + ([("<|im_start|>assistant\n", F)] if prompt else [])


def alpaca(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = [(system, U) if system else (ALPACA, F), ("\n\n", F)]
    for i, (role, text) in enumerate(turns):
        if role == "user":
            pieces += [("\n\n" if i else "", F), ("### Instruction:\n", F), (text, U), ("\n\n", F)]
        else:
            pieces += [("### Response:\n", F), (text, A), ("", E)]
    return pieces + ([("### Response:\n", F)] if prompt else [])


def vicuna(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = [(system, U) if system else (VICUNA, F), (" ", F)]
    for role, text in turns:
        pieces += [("USER: ", F), (text, U), (" ", F)] if role == "user" else [("ASSISTANT:", F), (" " + text, A),
                                                                               ("", E)]
    return pieces + ([("ASSISTANT:", F)] if prompt else [])


def llama2(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = []
    for i, (role, text) in enumerate(turns):
        if role == "user":
            head = [("<<SYS>>\n", F), (system, U), ("\n<</SYS>>\n\n", F)] if system and i == 0 else []
            pieces += [("<s>" if i else "", F), ("[INST] ", F), *head, (text.strip(), U), (" [/INST]", F)]
        else:
            pieces += [(" " + text.strip() + " ", A), ("</s>", E)]
    return pieces


def llama3(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = []
    for role, text in ([("system", system)] if system else []) + turns:
        pieces += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", F)]
        pieces += [(text.strip(), A), ("<|eot_id|>", E)] if role == "assistant" else [(text.strip(), U),
                                                                                      ("<|eot_id|>", F)]
    return pieces + ([("<|start_header_id|>assistant<|end_header_id|>\n\n", F)] if prompt else [])


def zephyr(system: str | None, turns: list[tuple[str, str]], prompt: bool):
    pieces = []
    for role, text in ([("system", system)] if system else []) + turns:
        pieces += [(f"<|{role}|>\n", F)]
        pieces += [(text, A), ("", E), ("\n", F)] if role == "assistant" else [(text, U), ("</s>\n", F)]
    return pieces + ([("<|assistant|>\n", F)] if prompt else [])


FORMATS = {"chatml": chatml, "alpaca": alpaca, "vicuna": vicuna, "llama2": llama2, "llama3": llama3, "zephyr": zephyr}


def use_format(tokenizer, name: str = "") -> str:
    """Takes the format of this name, or the model's own, or where it has none chatml (if its tokens exist) or alpaca.
    Its end token becomes an end token of the tokenizer: a base model that learns chatml must stop at <|im_end|>."""
    if tokenizer is None:
        raise UserError("this model has no tokenizer: put tokenizer.json or tokenizer.model beside its weights")
    if name and name not in FORMATS:
        raise UserError(f"--template {name} is unknown; known: {', '.join(FORMATS)}")
    default = "chatml" if "<|im_start|>" in tokenizer.specials else "alpaca"
    tokenizer.chat_template = name or tokenizer.chat_template or default
    ids, mask = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    end = [i for i, supervised in zip(ids, mask) if supervised][-1]
    if end not in tokenizer.eos_ids:
        tokenizer.eos_ids.insert(0, end)
    return tokenizer.chat_template


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
    """Neighbouring pieces of one kind are encoded together; exactly one BOS, if the tokenizer uses one."""
    joined: list[list[str]] = []
    for text, kind in pieces:
        if joined and joined[-1][1] == kind and kind != E:
            joined[-1][0] += text
        elif text or kind == E:
            joined.append([text, kind])
    ids: list[int] = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    mask = [0] * len(ids)
    for text, kind in joined:
        if kind == E:
            new = end_ids(tokenizer, text)
        else:
            start = not ids or (ids == [tokenizer.bos_id]) or (tokenizer.space_after
                                                               and ids[-1] in tokenizer.special_ids)
            new = tokenizer.encode(text, special=kind == F, start=start)
            if kind == F and ids and new and new[0] == tokenizer.bos_id == ids[0] and len(ids) == 1:
                new = new[1:]                             # the template writes the BOS itself: one is enough
        ids += new
        mask += [int(kind in (A, E))] * len(new)
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

BLANK = "\x1f"                             # counts as a space for `trim`, and nobody writes it

def jinja_pieces(tokenizer, template: str, messages: list[dict], prompt: bool) -> list[tuple[str, str]]:
    """Renders the template with a marker for each content and splits the text there. The markers are letters between
    two private characters, so that a template that tests its contents treats them as it would treat words; the blanks
    around them tell whether the template trims."""
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    rows = [{**m, "content": f"{BLANK}{mark}{BLANK}"} for m, mark in zip(messages, marks)]
    text = render_template(tokenizer, template, rows, prompt)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if any(text.count(marks[i]) != 1 for i in answers):
        raise UserError("the chat template does not print every answer exactly once, so it is unclear what to "
                        "supervise: "
                        f"pass --template with one of {', '.join(FORMATS)}")
    bos = tokenizer.token_of.get(tokenizer.bos_id, "\0")
    pieces: list[tuple[str, str]] = []
    if text.startswith(bos):
        text = text[len(bos):]
        pieces = [] if tokenizer.add_bos else [(bos, F)]
    for part in re.split(f"({BLANK}?\ue000\\d+\ue001{BLANK}?)", text):
        if (mark := part.strip()) not in marks:
            pieces.append((part, F))
            continue
        m = messages[marks.index(mark)]
        content = m["content"] if part.startswith(BLANK) else m["content"].lstrip()
        content = content if part.endswith(BLANK) else content.rstrip()
        if m["role"] == "assistant" and pieces[-1][1] == F:
            # Where the prompt ends is what the template says without the answer: a space behind it belongs to the
            # answer.
            opening = render_template(tokenizer, template, rows[:marks.index(mark)], True).split("\ue001" + BLANK)[-1]
            opening = opening.split("\ue001")[-1]
            before = pieces[-1][0]
            if before.startswith(opening) and before[len(opening):].isspace():
                pieces[-1], content = (opening, F), before[len(opening):] + content
        pieces.append((content, A if m["role"] == "assistant" else U))
    return split_ends(tokenizer, pieces)


def split_ends(tokenizer, pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Behind each answer the template's text begins with the end token: that one is supervised, what follows is not."""
    out: list[tuple[str, str]] = []
    for i, (text, kind) in enumerate(pieces):
        if kind == F and i and pieces[i - 1][1] == A:
            blank = len(text) - len(text.lstrip())
            end = next((s for s in sorted(tokenizer.specials, key=len, reverse=True) if text[blank:].startswith(s)),
                       None)
            if end is None:
                raise UserError(f"the chat template prints {text[:20]!r} behind an answer, no special token: the model "
                                "could not learn to stop. Pass --template")
            out += [(text[:blank], A), (end, E), (text[blank + len(end):], F)]
        elif kind == A and i + 1 == len(pieces):
            out += [(text, A), ("", E)]
        else:
            out.append((text, kind))
    return [(t, k) for t, k in out if t or k == E]


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


def render_template(tokenizer, template: str, messages: list[dict], add_generation_prompt: bool) -> str:
    import jinja2
    eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    ids = {"bos": tokenizer.bos_id, "eos": eos, "pad": tokenizer.pad_id}
    names = {f"{name}_token": tokenizer.token_of.get(i, "") for name, i in ids.items()}
    try:
        return compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                         **names)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot be rendered: {error}") from None
