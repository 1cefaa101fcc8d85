"""Talk to a model in the terminal. The answer is printed token by token, and never half a character.

    python chat.py                                               # smollm2-135m
    python chat.py out/ppo/model                                 # a directory, an adapter, a name, a run folder
    python chat.py out/sft/model --prompt "Who are you?"         # one answer on stdout and nothing else
    echo "Who are you?" | python chat.py out/sft/model           # the same from a pipe
    python chat.py --compare smollm2-135m out/sft/model out/ppo/model              # every prompt, one after the other
    python chat.py --compare A B --prompts prompts.jsonl --out answers.jsonl       # a file of prompts

A turn is: render the whole conversation, leave out the oldest turns if it does not fit, generate, and put the answer
behind the question. Nothing else is remembered: /undo is the removal of two messages.
"""
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoints
import common
from checkpoints.formats import read_json
from common import UserError
from data import chat, formats

HELP = """/reset            forget the conversation        /undo             forget the last question and its answer
/system TEXT      what the model is told first   /temperature X    0: always the most likely token
/seed N           begin the dice anew            /save FILE        add the conversation to FILE, a row for sft.py
/quit             leave, like Ctrl-D             Ctrl-C            stop the answer, keep the chat
A message that should begin with / begins with a space."""


@dataclass
class Config:
    # --- models ---
    model: str = "smollm2-135m"        # directory, adapter or name; may stand without --model: chat.py DIR
    compare: tuple[str, ...] = ()      # several models: each answers every prompt and has its own conversation
    template: str = ""                 # alpaca, vicuna, chatml, llama2, llama3, zephyr; none: plain completion
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: str = "auto"                # auto | bf16 | fp32
    # --- answers ---
    system: str = ""                   # what the model is told before the conversation
    temperature: float = 0.7           # 0: always the most likely token
    top_p: float = 0.95                # sample among the likeliest tokens that have this probability together
    max_new_tokens: int = 256          # an answer is cut there
    seed: int = 0                      # the same seed and the same questions give the same answers
    # --- without a conversation ---
    prompt: str = ""                   # one answer, then leave; without it a pipe is read as one prompt
    prompts: str = ""                  # a json or jsonl file: every prompt of it is answered
    out: str = ""                      # the answers go here as jsonl: prompt, answers by model, where


# ---------------------------------------------------------------- the terminal

# What a model writes is foreign text: an escape sequence in it could move the cursor, retitle the window or type keys.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(text: str) -> None:
    print(CONTROL.sub("", text), end="", flush=True)


def note(text: str) -> None:
    """What we say ourselves: on stderr, so that stdout holds answers only; grey where someone reads along."""
    text = CONTROL.sub("", text)
    print(f"\x1b[90m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- one model

@dataclass
class Answer:
    text: str
    tokens: int
    seconds: float
    cut: str = ""                      # why it stopped, when the model did not end it itself


class Speaker:
    """A model with its tokenizer, its own conversation and its own dice."""
    def __init__(self, name: str, cfg: Config, world: common.World):
        self.name, self.cfg = name, cfg
        self.model, self.tokenizer = checkpoints.load(find(name), world.device, world.dtype)
        if self.tokenizer is None:
            raise UserError(f"{name} has no tokenizer: put tokenizer.json or tokenizer.model beside its weights")
        self.plain = cfg.template == "none"
        self.stops = set(self.tokenizer.eos_ids)
        if not self.plain:
            self.choose_format()
        self.generator = torch.Generator(world.device)
        self.begin()

    def choose_format(self) -> None:
        tokenizer = self.tokenizer
        if not self.cfg.template and not tokenizer.chat_template:
            tokenizer.chat_template = "chatml" if "<|im_start|>" in tokenizer.specials else "alpaca"
            note(f"{self.name} names no chat format: {tokenizer.chat_template} is used (--template NAME takes another, "
                 "--template none completes plain text)")
        tokenizer.chat_template = self.cfg.template or tokenizer.chat_template
        # A format may end a turn with a token that the tokenizer does not count among its ends, as chatml does on a
        # base model. The last supervised token of a conversation is that end, whatever the format.
        ids, mask = tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        self.stops.add(next(i for i, supervised in zip(reversed(ids), reversed(mask)) if supervised))

    def begin(self) -> None:
        """A new conversation with new dice."""
        self.history: list[dict] = []                    # user, assistant, user, assistant ...
        self.left_out = 0
        self.generator.manual_seed(self.cfg.seed)

    def ask(self, text: str, say: Callable[[str], None]) -> Answer:
        """One turn of the conversation. A question that got no answer stays for /undo, but the model is not shown it."""
        text = text.encode("utf-8", "replace").decode("utf-8")                 # half a surrogate pair is no text
        pairs = zip(self.history[::2], self.history[1::2])
        messages = [m for pair in pairs if pair[1]["content"] for m in pair]
        answer = self.reply(messages + [{"role": "user", "content": text}], say)
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        return answer

    def reply(self, messages: list[dict], say: Callable[[str], None]) -> Answer:
        """The answer to a conversation that ends with a question; say(text) receives it piece by piece."""
        if self.cfg.system and not self.plain and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.cfg.system}, *messages]
        ids = self.fit(messages)
        room = min(self.cfg.max_new_tokens, self.model.config.max_positions - len(ids))
        stream, said, tokens, cut = self.tokenizer.stream(), "", 0, f"cut after {room} tokens"

        def on_token(new: torch.Tensor) -> None:
            nonlocal said, tokens, cut
            tokens += 1
            if int(new[0]) in self.stops:
                cut = ""
            else:
                emit(stream.push(int(new[0])))

        def emit(piece: str) -> None:
            nonlocal said
            # Formats put the space between "ASSISTANT:" and the answer themselves: kept, it would be there twice.
            piece = piece if said or self.plain else piece.lstrip()
            said += piece
            say(piece)

        started = time.perf_counter()
        try:
            prompt = torch.tensor([ids], device=self.model.embed_tokens.weight.device)
            self.model.generate(prompt, room, temperature=self.cfg.temperature, top_p=self.cfg.top_p,
                                eos_ids=self.stops, generator=self.generator, on_token=on_token)
        except KeyboardInterrupt:
            cut = "stopped"
        except FloatingPointError as error:
            raise UserError(f"{self.name}: {error}. On a machine without real bf16 try --dtype fp32") from None
        emit(stream.flush())                             # the beginning of a character whose rest never came
        return Answer(said if self.plain else said.rstrip(), tokens, time.perf_counter() - started, cut)

    def fit(self, messages: list[dict]) -> list[int]:
        """Ids of the prompt. The oldest turns stay out until the answer has room: its full length, or half the model."""
        if self.plain:                                   # every text is continued on its own: nobody has a role
            ids, left_out = chat.encode_pieces(self.tokenizer, [(messages[-1]["content"], chat.U)])[0], 0
        else:
            first = int(messages[0]["role"] == "system")
            system, turns, left_out = messages[:first], messages[first:], 0
            limit = self.model.config.max_positions
            room = limit - min(self.cfg.max_new_tokens, limit // 2)
            while len(ids := self.tokenizer.render(system + turns, add_generation_prompt=True)[0]) > room and turns[2:]:
                turns, left_out = turns[2:], left_out + 1
        if len(ids) >= self.model.config.max_positions:
            raise UserError(f"{self.name} reads {self.model.config.max_positions} tokens, this message alone is "
                            f"{len(ids)}: shorten it{' or the system message' if self.cfg.system else ''}")
        if left_out > self.left_out:
            note(f"{self.name} reads {self.model.config.max_positions} tokens: "
                 f"{'the oldest turn is' if left_out == 1 else f'the {left_out} oldest turns are'} left out from now on")
        self.left_out = left_out
        return ids


def find(name: str) -> Path:
    """Where the weights are: of a run folder its model/. A reward model is refused before it is loaded."""
    path = checkpoints.resolve(name)
    files = [path / file for file in ("config.json", "adapter_config.json")] if path.is_dir() else []
    raw = {key: value for file in files if file.exists() for key, value in read_json(file).items()}
    if "stage" in raw:
        return find(str(path / "model"))
    if checkpoints.is_classifier(raw) or raw.get("task_type") == "SEQ_CLS" or (path / "reward.json").exists():
        raise UserError(f"{name}: this is a reward model; it judges and does not write")
    return path


# ---------------------------------------------------------------- conversation

def talk(speakers: list[Speaker], cfg: Config, read: Callable[[str], str] = input) -> None:
    with contextlib.suppress(ImportError):               # arrow keys and history; Windows has its own and no readline
        import readline  # noqa: F401
    while True:
        try:
            line = read("> ")
            if line.startswith("/") and re.fullmatch(r"/\w+", line.split()[0]):
                if command(line, speakers, cfg) == "quit":
                    return
            elif line.strip():
                ask_all(speakers, lambda speaker, text=line.strip(): speaker.ask(text, show))
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:                        # while nothing was being said: leaving is Ctrl-D
            note("\n/quit or Ctrl-D leaves")
        except EOFError:
            print()
            return


def ask_all(speakers: list[Speaker], ask: Callable[[Speaker], Answer]) -> dict[str, Answer]:
    """Every model's answer to the same question, each under its name when there are several."""
    answers = {}
    for speaker in speakers:
        if len(speakers) > 1:
            show(f"--- {speaker.name}\n")
        answer = answers[speaker.name] = ask(speaker)
        show("\n")
        figures = f"{answer.tokens} tokens, {answer.tokens / max(1e-9, answer.seconds):.0f} tokens/s"
        remarks = [figures] if sys.stdout.isatty() else []
        remarks += [remark for remark in (answer.cut, "" if answer.text.strip() else "an empty answer") if remark]
        if remarks:
            note(", ".join(remarks))
    return answers


def command(line: str, speakers: list[Speaker], cfg: Config) -> str:
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name == "help":
        note(HELP)
    elif name == "reset":
        for speaker in speakers:
            speaker.history, speaker.left_out = [], 0    # the dice go on: the same question gets another answer
        note("a new conversation")
    elif name == "undo":
        for speaker in speakers:
            del speaker.history[-2:]
        note(f"{len(speakers[0].history) // 2} turns left")
    elif name == "system":
        cfg.system = rest
        note("told from the next answer on" if rest else "no system message")
    elif name in ("temperature", "seed"):
        kind = float if name == "temperature" else int
        check(dataclasses.replace(cfg, **{name: common.checked(f"/{name}", rest, kind)}))
        setattr(cfg, name, kind(rest))
        for speaker in speakers if name == "seed" else ():
            speaker.generator.manual_seed(cfg.seed)
        note(f"{name} {rest}")
    elif name == "save":
        save(rest, speakers, cfg)
    elif name != "quit":
        known = ("help", "reset", "system", "temperature", "seed", "save", "undo", "quit")
        raise UserError(common.no_such("command", name, known) + " /help lists them")
    return name


def save(file: str, speakers: list[Speaker], cfg: Config) -> None:
    """Adds one row per model to a jsonl file, in the form that sft.py reads."""
    head = [{"role": "system", "content": cfg.system}] if cfg.system else []
    rows = [{"messages": head + speaker.history, "model": speaker.name} for speaker in speakers if speaker.history]
    if not file or not rows:
        raise UserError("/save FILE needs a name" if not file else "nothing has been said yet: nothing to save")
    try:
        with open(Path(file).expanduser(), "a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    note(f"{len(rows)} row{'s' * (len(rows) > 1)} added to {file}")


# ---------------------------------------------------------------- without a conversation

def answer_rows(speakers: list[Speaker], rows: list[dict], out: io.TextIOBase | None) -> bool:
    """Every row's prompt, each as if it were the only one: the answer does not depend on its place in the file."""
    for n, row in enumerate(rows, 1):
        if len(rows) > 1:
            note(f"{n}/{len(rows)} {row['where']}: {row['prompt'][-1]['content']}")
        for speaker in speakers:
            speaker.begin()
        answers = ask_all(speakers, lambda speaker, row=row: speaker.reply(row["prompt"], show))
        if any(answer.cut == "stopped" for answer in answers.values()):
            return False                                 # Ctrl-C ends the whole list, what is written stays
        if out is not None:
            row = {**row, "answers": {name: answer.text for name, answer in answers.items()}}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
    return True


def read_rows(cfg: Config) -> list[dict] | None:
    """The prompts that were given with the command; None: somebody sits at the keyboard."""
    if cfg.prompts:
        return formats.read_prompts(cfg.prompts)
    if not cfg.prompt and sys.stdin.isatty():
        return None
    text = cfg.prompt or sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise UserError("the pipe was empty: echo \"Who are you?\" | python chat.py DIR, or --prompt TEXT")
    text = text.encode("utf-8", "replace").decode("utf-8")
    return [{"prompt": [{"role": "user", "content": text}], "where": "--prompt" if cfg.prompt else "stdin"}]


# ---------------------------------------------------------------- command line

def arguments(argv: list[str]) -> Config:
    """Words that belong to no option are models: chat.py DIR --seed 1 is --model DIR. Names may contain spaces."""
    models, compare, rest = [], [], []
    into, room = models, math.inf                        # where the next words go, and how many of them
    for word in argv:
        if word == "--compare":
            into, room = compare, math.inf
        elif word.startswith("--") or word == "-h":
            rest.append(word)
            into, room = rest, 0 if "=" in word else 1
        else:
            into = into if room else models
            into.append(word)
            room -= 1
    cfg = common.parse(Config, rest)
    if len(models) > 1 and not (compare or cfg.compare):
        raise UserError(f"{len(models)} models without --compare: python chat.py --compare {' '.join(models)}")
    if "--compare" in argv and not compare:
        raise UserError("--compare needs at least one model")
    cfg.compare = (*cfg.compare, *models, *compare) if compare or cfg.compare else ()
    cfg.model = models[0] if models else cfg.model
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    for name, ok, wanted in (("temperature", 0 <= cfg.temperature < math.inf, "0 or more"),
                             ("top_p", 0 < cfg.top_p <= 1, "more than 0, at most 1"),
                             ("max_new_tokens", cfg.max_new_tokens >= 1, "at least 1")):
        if not ok:
            raise UserError(f"{name} is {getattr(cfg, name)}, expected {wanted}")
    if cfg.template and cfg.template != "none" and cfg.template not in chat.FORMATS:
        raise UserError(f"{common.no_such('template', cfg.template, chat.FORMATS)} Known: {', '.join(chat.FORMATS)}, none")
    if cfg.prompt and cfg.prompts:
        raise UserError("--prompt and --prompts together: one of them")
    if cfg.out and not cfg.prompts and not cfg.prompt:
        raise UserError("--out takes the answers to --prompts FILE or --prompt TEXT; in a conversation /save FILE")


def main(cfg: Config) -> bool:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):         # a character that the terminal lacks must not end the chat
            stream.reconfigure(errors="replace")
    rows = read_rows(cfg)
    try:
        # Before minutes of generating, and never over what is there.
        out = open(cfg.out, "x", encoding="utf-8") if cfg.out else None
    except OSError as error:
        raise UserError(f"--out {cfg.out} cannot be written: {error.strerror}") from None
    world = common.setup(cfg.device, cfg.dtype, cfg.seed, quiet=True)
    speakers = [Speaker(name, cfg, world) for name in dict.fromkeys(cfg.compare or (cfg.model,))]
    if rows is not None:
        with out or contextlib.nullcontext():
            return answer_rows(speakers, rows, out)
    for speaker in speakers:
        size, kind = sum(p.numel() for p in speaker.model.parameters()), str(world.dtype).removeprefix("torch.")
        note(f"{speaker.name}: {common.human(size)} parameters, {kind} on {world.device}")
    note("the model continues your text; every text stands alone" if speakers[0].plain else "/help lists the commands")
    talk(speakers, cfg)
    return True


if __name__ == "__main__":
    common.main(lambda: main(arguments(sys.argv[1:])))
