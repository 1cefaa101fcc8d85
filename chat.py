"""Talk to a model in the terminal. The answer is printed token by token, and never half a character.

    python chat.py                                               # smollm2-135m
    python chat.py out/ppo/model                                 # a directory, an adapter, a name, a run folder
    python chat.py out/sft/model --prompt "Who are you?"         # one answer on stdout and nothing else
    echo "Who are you?" | python chat.py out/sft/model           # the same from a pipe
    python chat.py --compare smollm2-135m out/sft/model out/ppo/model              # all answer, one after the other
    python chat.py --compare A B --prompts prompts.jsonl --out answers.jsonl       # a file of prompts

A turn: render the whole conversation, leave out the oldest turns while it does not fit, generate, put the answer behind
the question. Nothing else is remembered: /undo removes two messages.
"""
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoints
import common
from common import UserError
from data import chat, formats

HELP = """/reset          forget the conversation         /undo            forget the last question and its answer
/system TEXT    what the model is told first    /temperature X   0: always the most likely token
/seed N         draw anew from this seed        /save FILE       add the conversation to FILE, a row for sft.py
/quit, Ctrl-D   leave                           Ctrl-C           stop the answer, keep the chat"""


@dataclass
class Config:
    # --- models ---
    model: str = "smollm2-135m"        # directory, adapter or name; also without --model: chat.py DIR
    compare: tuple[str, ...] = ()      # several models: each answers every prompt and has its own conversation
    template: str = ""                 # a chat format (help: a list); empty: the model's own; none: plain completion
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: str = "auto"                # auto | bf16 | fp32
    quant: str = ""                    # nf4: the linears in four bits, as the stages load a model with --quant
    # --- answers ---
    system: str = ""                   # what the model is told before the conversation
    temperature: float = 0.7           # 0: always the most likely token
    top_p: float = 0.95                # draw among the likeliest tokens that have this probability together
    max_new_tokens: int = 256          # an answer is cut there
    seed: int = 0                      # the same seed and questions give the same answers
    graph: bool = False                # steps of one shape, on a GPU from a CUDA graph: the same but for rounding
    # --- without a conversation ---
    prompt: str = ""                   # one answer, then leave; without it a pipe is read as one prompt
    prompts: str = ""                  # a json or jsonl file: every prompt of it is answered
    skip_bad: bool = False             # count rows of prompts that cannot be read, and go on
    out: str = ""                      # the answers go here as jsonl: the row, and its answers by model


# What a model writes is foreign text: an escape sequence in it could retitle the window, move the cursor, type keys.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(text: str) -> None:
    print(CONTROL.sub("", text), end="", flush=True)


def note(text: str) -> None:
    """What we say ourselves: on stderr, so that stdout holds answers only; grey where somebody reads along."""
    text = CONTROL.sub("", text)
    print(f"\x1b[90m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- one model

class Speaker:
    """A model with its tokenizer, its own conversation and its own random numbers."""
    def __init__(self, name: str, cfg: Config, world: common.World):
        self.name, self.cfg, self.plain = name, cfg, cfg.template == "none"
        self.model, tokenizer = checkpoints.load(find(name), world.device, world.dtype, quant=cfg.quant)
        own = tokenizer and tokenizer.chat_template
        used = chat.use_format(tokenizer, "" if self.plain else cfg.template)
        self.next_question = "" if self.plain else chat.next_question(used)
        if not (own or cfg.template):
            note(f"{name} names no chat format, {used} is used: --template takes another, or none")
        self.tokenizer, self.stops, self.left_out = tokenizer, set(tokenizer.eos_ids), 0
        self.history: list[dict] = []                    # user, assistant, user, assistant ...
        self.generator = torch.Generator(world.device).manual_seed(cfg.seed)

    def ask(self, text: str) -> tuple[str, str]:
        """One turn. A question that got no answer stays for /undo, but the model is not shown it again."""
        pairs, question = zip(self.history[::2], self.history[1::2]), {"role": "user", "content": text}
        answer, end = self.reply([m for pair in pairs if pair[1]["content"] for m in pair] + [question])
        self.history += [question, {"role": "assistant", "content": answer}]
        return answer, end

    def reply(self, messages: list[dict]) -> tuple[str, str]:
        """Shows the answer to a conversation while it is made -> (the answer, what cut it short or "")."""
        if self.cfg.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.cfg.system}, *messages]
        show(f"--- {self.name}\n" if len(self.cfg.compare) > 1 else "")
        ids, started = self.fit(messages), time.perf_counter()
        room = min(self.cfg.max_new_tokens, self.model.config.max_positions - len(ids))
        stream, text, held, tokens, end = self.tokenizer.stream(), "", "", 0, f"cut after {room} tokens"

        def say(piece: str, last: bool = False) -> None:
            nonlocal text, held
            piece, held, asks = before_question(held + piece, self.next_question, last)
            # The space between "ASSISTANT:" and the answer belongs to the format: kept, it would be there twice.
            text += (piece := piece if text or self.plain else piece.lstrip())
            show(piece)
            if asks:
                raise AsksItself

        def on_token(new: torch.Tensor) -> None:
            nonlocal tokens, end
            tokens, end = tokens + 1, "" if int(new) in self.stops else end
            say(stream.push(int(new)) if end else "")

        try:
            prompt = torch.tensor([ids], device=self.model.embed_tokens.weight.device)
            self.model.generate(prompt, room, temperature=self.cfg.temperature, top_p=self.cfg.top_p,
                                eos_ids=self.stops, generator=self.generator, on_token=on_token, graph=self.cfg.graph)
        except AsksItself:
            end = ""
        except KeyboardInterrupt:
            end = "stopped"
        say("" if end else stream.flush(), last=True)    # an answer that was cut may be cut inside a character
        show("\n")
        speed = f"{tokens} tokens, {tokens / (time.perf_counter() - started):.0f} tokens/s"
        if remarks := [x for x in (speed if sys.stdout.isatty() else "", end, "" if text else "no answer") if x]:
            note(", ".join(remarks))
        return text if self.plain else text.rstrip(), end

    def fit(self, messages: list[dict]) -> list[int]:
        """Ids of the prompt. Old turns stay out until the answer has room: its full length, or half the positions."""
        limit, system, left_out = self.model.config.max_positions, [m for m in messages if m["role"] == "system"], 0
        turns = messages[len(system):]
        if self.plain:                                   # no roles: every text is continued on its own
            ids = chat.encode_pieces(self.tokenizer, [(turns[-1]["content"], chat.U)])[0]
        else:
            room = limit - min(self.cfg.max_new_tokens, limit // 2)
            while len(ids := self.tokenizer.render(system + turns, add_generation_prompt=True)[0]) > room and turns[2:]:
                turns, left_out = turns[2:], left_out + 1
        if len(ids) >= limit:
            raise UserError(f"{self.name} reads {limit} tokens, this message alone is {len(ids)}: shorten it")
        if left_out > self.left_out:
            note(f"the conversation outgrows the {limit} tokens of {self.name}: oldest turns left out: {left_out}")
        self.left_out = left_out
        return ids


class AsksItself(Exception):
    """The model goes on with a question of its own."""


def before_question(text: str, question: str, last: bool) -> tuple[str, str, bool]:
    """Cuts off the question -> (what can be shown, what may be its beginning and waits, whether it is there).
    "Yes.\\nBo", "\\nBob:" -> "Yes.", "\\nBo", False"""
    if question and question in text:
        return text[:text.index(question)], "", True
    waits = 0 if last else next((n for n in range(len(question) - 1, 0, -1) if text.endswith(question[:n])), 0)
    return text[:len(text) - waits], text[len(text) - waits:], False


def find(name: str | Path) -> Path:
    """Where the weights are; in a run folder that is model/. A reward model is refused before it is loaded."""
    path, raw = checkpoints.resolve(name), {}
    for file in (path / "config.json", path / "adapter_config.json"):
        raw |= checkpoints.formats.read_json(file) if file.exists() else {}
    if "stage" in raw:                                   # over a base in four bits the adapter is all there is
        return find(next((p for p in map(path.joinpath, ("model", "adapter", "policy")) if p.exists()), path / "model"))
    if checkpoints.is_classifier(raw) or raw.get("task_type") == "SEQ_CLS" or (path / "reward.json").exists():
        raise UserError(f"{name}: this is a reward model; it judges and does not write")
    return path


# ---------------------------------------------------------------- a conversation

def talk(speakers: list[Speaker], cfg: Config) -> None:
    with contextlib.suppress(ImportError):               # arrow keys; Windows has its own and no readline
        import readline  # noqa: F401
    while True:
        try:
            line = well_formed(input("> "))
            if re.match(r"/\w+(\s|$)", line):            # not "/etc/hosts is ..."; with a space in front nothing is
                if command(*line[1:].rstrip().partition(" ")[::2], speakers, cfg) == "quit":
                    return
            elif line.strip():
                for speaker in speakers:
                    speaker.ask(line.strip())
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")
        except EOFError:
            return print()


def command(name: str, rest: str, speakers: list[Speaker], cfg: Config) -> str:
    done, rest = "", rest.strip()
    if name == "help":
        done = HELP
    elif name in ("reset", "undo"):
        for speaker in speakers:                         # the dice go on: the same question gets another answer
            speaker.history, speaker.left_out = [] if name == "reset" else speaker.history[:-2], 0
        done = f"questions remembered: {len(speakers[0].history) // 2}"
    elif name in ("system", "temperature", "seed"):
        value = common.checked("/" + name, rest, type(getattr(cfg, name)))
        check(dataclasses.replace(cfg, **{name: value}))
        setattr(cfg, name, value)
        for speaker in speakers if name == "seed" else ():
            speaker.generator.manual_seed(value)
        done = f"{name} is {value!r} from the next answer on"
    elif name == "save":
        system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        rows = [{"messages": system + s.history, "model": s.name} for s in speakers if s.history]
        if not rest or not rows:
            raise UserError("nothing has been said yet" if rest else "/save needs the name of a file")
        with open_file(rest, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        done = f"rows added to {rest}: {len(rows)}"
    elif name != "quit":
        commands = ["help", "reset", "undo", "system", "temperature", "seed", "save", "quit"]
        raise UserError(common.no_such("command", "/" + name, ["/" + c for c in commands]) + " /help lists them all")
    note(done) if done else None
    return name


# ---------------------------------------------------------------- prompts that came with the command

def answer_rows(speakers: list[Speaker], rows: list[dict], file: io.TextIOBase | None) -> bool:
    """Answers every row as if it were the only one, so that an answer does not depend on its place in the file."""
    for n, row in enumerate(rows, 1):
        answers = {}
        if len(rows) > 1:
            note(f"{n}/{len(rows)} {row['where']}: {row['prompt'][-1]['content']}")
        for speaker in speakers:
            speaker.generator.manual_seed(speaker.cfg.seed)
            answers[speaker.name], end = speaker.reply(row["prompt"])
            if end == "stopped":
                return False                             # Ctrl-C ends the whole list; what is written stays
        if file is not None:
            file.write(json.dumps({**row, "answers": answers}, ensure_ascii=False) + "\n")
            file.flush()
    return True


def well_formed(text: str) -> str:
    """Half a surrogate pair, as terminals pass on bytes that are no UTF-8, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def open_file(name: str, mode: str) -> io.TextIOBase:
    try:
        return open(Path(name).expanduser(), mode, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------- command line

def arguments(argv: list[str]) -> Config:
    """Words that belong to no option are models: chat.py DIR --seed 1. Their names may contain spaces and commas."""
    models, compare, rest = [], [], []
    into, room = models, math.inf                        # where the next words go, and how many of them
    for word in argv:
        if word == "--compare":
            into, room = compare, math.inf
        elif word.startswith("--") or word == "-h":
            into, room = rest, 0 if "=" in word else 1
            rest.append(word)
        else:
            into, room = into if room else models, room - 1
            into.append(word)
    cfg = common.parse(Config, rest)
    if len(models) > 1 and "--compare" not in argv:
        raise UserError(f"several models: python chat.py --compare {' '.join(models)}")
    if "--compare" in argv:
        cfg.compare = tuple(dict.fromkeys(models + compare))
        if len(cfg.compare) < 2:
            raise UserError("--compare needs two different models or more")
    cfg.model = models[0] if models else cfg.model
    return check(cfg)


def check(cfg: Config) -> Config:
    for name, fine, wanted in (
            ("temperature", 0 <= cfg.temperature < math.inf, "0 or more"),
            ("top_p", 0 < cfg.top_p <= 1, "a number above 0, at most 1"),
            ("max_new_tokens", cfg.max_new_tokens > 0, "1 or more"),
            ("seed", abs(cfg.seed) < 2**63, "less than 2**63"),
            ("system", not cfg.system or cfg.template != "none", "nothing: --template none has no place for it"),
            ("prompts", not (cfg.prompt and cfg.prompts), "nothing when there is --prompt"),
            ("out", not cfg.out or cfg.prompt or cfg.prompts, "nothing without --prompt or --prompts")):
        if not fine:
            raise UserError(f"{name} is {getattr(cfg, name)!r}, expected {wanted}")
    chat.check_format("" if cfg.template == "none" else cfg.template)
    return cfg


def main(cfg: Config) -> bool:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):         # a character that a terminal lacks must not end the chat
            stream.reconfigure(errors="replace")
    rows = None
    if cfg.prompts:
        with contextlib.redirect_stdout(sys.stderr):     # on stdout there are answers only
            rows = formats.read_prompts(cfg.prompts, skip_bad=cfg.skip_bad)
            rows.print_report()
    elif cfg.prompt or not sys.stdin.isatty():
        text = well_formed(cfg.prompt or sys.stdin.read()).strip()
        rows = [{"prompt": [{"role": "user", "content": text}], "where": "the prompt"}]
        if not text:
            raise UserError('nothing came through the pipe: echo "Who are you?" | python chat.py DIR')
    world = common.setup(cfg.device, cfg.dtype, cfg.seed, quiet=True)
    speakers = [Speaker(name, cfg, world) for name in cfg.compare or (cfg.model,)]
    if rows is not None:
        # Mode x: what is there is never overwritten.
        with open_file(cfg.out, "x") if cfg.out else contextlib.nullcontext() as file:
            return answer_rows(speakers, rows, file)
    note("every text is continued on its own" if speakers[0].plain else "/help lists the commands, Ctrl-D leaves")
    talk(speakers, cfg)
    return True


if __name__ == "__main__":
    common.main(lambda: main(arguments(sys.argv[1:])))
