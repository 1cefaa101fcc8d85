"""The plumbing: command line, schedule, optimiser groups, ranks, and a run folder that survives kill -9 at any moment.

Two tests need processes of their own (one that is killed, two that talk to each other). They run this very file with
the name of a function; that process imports torch once and forks, which is ten times faster than starting each anew.
"""
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402


@dataclass
class Config:
    # --- data ---
    data: str = "a # b"                      # file with 100 % of the rows
    names: tuple[str, ...] = ("x", "y")      # several of them
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: list[int] = None                  # how large
    # --- training ---
    learning_rate: float = 1e-4              # lower it when the loss jumps
    steps: int = 0
    missing: float | None = -1.0             # none: off
    merge: bool = True
    flag: bool = False                       # off by default
    out_dir: str = "out"
    overwrite: bool = False


def parse(*words: str) -> Config:
    return common.parse(Config, list(words))


# ---------------------------------------------------------------- command line

def test_values_of_every_type():
    assert parse() == Config()
    cfg = parse("--learning-rate", "1e-3", "--steps=7", "--names", "a,b", "c", "--betas", "0.5", "1", "--sizes", "3,4",
                "--missing=-2e-1", "--no-merge", "--flag", "--data", "x=y -1")
    assert cfg == Config("x=y -1", ("a", "b", "c"), (0.5, 1.0), [3, 4], 1e-3, 7, -0.2, False, True)
    assert type(cfg.steps) is int and type(cfg.betas[1]) is float


@pytest.mark.parametrize("words, field, value", [
    (["--missing", "none"], "missing", None), (["--missing", "-1e-3"], "missing", -1e-3),
    (["--missing", "-.5"], "missing", -0.5), (["--flag", "true"], "flag", True),
    (["--merge", "false"], "merge", False), (["--merge=False"], "merge", False),
    (["--no_merge"], "merge", False), (["--names"], "names", ()), (["--learning_rate=3"], "learning_rate", 3.0)])
def test_spellings(words, field, value):
    assert getattr(parse(*words), field) == value


@pytest.mark.parametrize("words, message", [
    (["--learning_rat", "1"], "no argument --learning_rat: did you mean --learning_rate?"),
    (["--learn", "1"], "no argument --learn"),                               # no abbreviations
    (["--steps", "1.5"], "--steps: expected int, found '1.5'"),
    (["--steps", "many"], "--steps: expected int, found 'many'"),
    (["--missing", "some"], "--missing: expected float | None, found 'some'"),
    (["--flag", "maybe"], "--flag: expected bool, found 'maybe'"),
    (["--betas", "0.9"], "--betas: expected tuple[float, float], found ['0.9']"),
    (["--steps"], "--steps: expected one argument"),
    (["stray"], "no argument stray")])
def test_a_wrong_command_line_is_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_config_file_is_overridden_by_the_command_line(tmp_path, capsys):
    file = tmp_path / "c.json"
    options = {"learning_rate": 3, "names": ["p", "q r"], "missing": None, "merge": False}
    file.write_text(json.dumps(options), encoding="utf-8")
    cfg = parse("--config", str(file), "--learning_rate", "4")
    assert (cfg.learning_rate, cfg.names, cfg.missing, cfg.merge) == (4.0, ("p", "q", "r"), None, False)
    file.write_text(json.dumps({"stage": "sft", "config": {"steps": 9}}), encoding="utf-8")   # a run's config.json
    assert parse("--config", str(file)).steps == 9
    for content, message in (({"steps": "x"}, "steps: expected int, found 'x'"), ({"steps": 1.5}, "int, found 1.5"),
                             ({"flag": "on it"}, "flag: expected bool"), ({"step": 1}, "no option step: did you mean")):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(SystemExit):
            parse("--config", str(file))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "none.json"))
    assert "none.json cannot be read" in capsys.readouterr().err


SCRIPT = '''"""What this script is for.

    L = sum of x
"""
import sys
from dataclasses import dataclass, field
sys.path.insert(0, {root!r})
import common
import ppo

@dataclass
class Config:
    # --- data ---
    data: str = "a # b"     # file with 100 % of the rows
    plain: int = 3
    # --- training ---
    lr: float = 1e-4        # lower it when the loss jumps
    must: int = field(kw_only=True)   # no default

if __name__ == "__main__":
    common.main(lambda: print(common.parse(Config)))
'''


def test_help_comes_from_the_comments_of_a_script(tmp_path):
    """Also where Config is defined in __main__, which inspect finds in another way than a module."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(common.__file__).parent)), encoding="utf-8")
    text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "What this script is for.\n\n    L = sum of x" in text            # the docstring, as it is written
    data, training = text.split("\ndata:\n")[1].split("\ntraining:\n")
    assert "--data str     file with 100 % of the rows (default: a # b)" in data and "--plain" in data
    assert "lower it when the loss jumps (default: 0.0001)" in training and "no default (required)" in training
    failed = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert failed.returncode == 2 and "must" in failed.stderr


# ---------------------------------------------------------------- main, setup

@pytest.mark.parametrize("result, code", [(True, 0), (None, 0), (False, 1)])
def test_main_exits_by_the_gate(result, code):
    with pytest.raises(SystemExit) as stop:
        common.main(lambda: result)
    assert stop.value.code == code


def test_main_prints_user_errors_without_a_traceback(capsys):
    class BadRow(common.UserError, ValueError):
        pass

    for error in common.UserError("file:3: bad"), BadRow("file:3: bad"), common.NonFinite("file:3: bad"):
        with pytest.raises(SystemExit) as stop:
            common.main(lambda error=error: (_ for _ in ()).throw(error))
        assert stop.value.code == 1 and capsys.readouterr().err == "error: file:3: bad\n"
    with pytest.raises(ValueError):                                          # a bug keeps its traceback
        common.main(lambda: int("x"))


def test_setup_says_where_it_runs_and_seeds_everything(capsys):
    world = common.setup("cpu", "auto", 5)
    first = (random.random(), float(np.random.rand()), float(torch.rand(())))
    expected = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    assert (world.device.type, world.dtype, world.rank, world.size, world.main) == ("cpu", expected, 0, 1, True)
    line = capsys.readouterr().out
    name = "bf16" if expected == torch.bfloat16 else "fp32"
    assert line.startswith(f"device cpu, dtype {name}, ranks 1, threads ") and f"torch {torch.__version__}" in line
    assert common.setup("cpu", "bf16", 5, quiet=True).dtype == torch.bfloat16 and capsys.readouterr().out == ""
    assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))
    with pytest.raises(common.UserError, match="fp16"):
        common.setup("cpu", "fp16")


@pytest.mark.parametrize("capability, dtype", [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_bf16_is_decided_by_compute_capability(monkeypatch, capsys, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)    # what torch says on a T4
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    assert common.setup().dtype == dtype
    assert ("no bf16" in capsys.readouterr().out) == (dtype == torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(common.UserError, match="--device cuda, but torch"):
        common.setup("cuda")


# ---------------------------------------------------------------- schedule, optimiser, gradients

def test_schedule():
    at = [common.lr_at(step, 12, 1.0, warmup=2) for step in range(12)]
    assert at[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])   # the first step moves, warm-up ends at the peak
    assert at[7] == pytest.approx(0.5)                                       # half of the 10 steps after warm-up
    assert common.lr_at(12, 12, 1.0, 2) == pytest.approx(0.0)
    assert common.lr_at(5, 10, 2.0, 0, "linear") == pytest.approx(1.0) and common.lr_at(0, 10, 2.0, 0, "linear") == 2.0
    assert common.lr_at(5, 10, 2.0, 0, "linear", floor=1.0) == pytest.approx(1.5)
    assert common.lr_at(10, 10, 2.0, 0, "cosine", floor=0.2) == pytest.approx(0.2)
    assert {common.lr_at(s, 10, 2.0, 0, "constant") for s in range(10)} == {2.0}
    assert common.lr_at(99, 10, 2.0, 0, "linear") == 0.0
    with pytest.raises(common.UserError, match="cosin is unknown"):
        common.lr_at(0, 10, 1.0, 0, "cosin")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    model[1].bias.requires_grad_(False)
    return model


def test_optimizer_groups_scale_and_decay():
    model = two_layers()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"name": "body", "params": named[:3], "lr": 1.0}, {"name": "head", "params": named[3:], "lr": 0.5}]
    opt = common.optimizer(model, groups, weight_decay=0.1)
    seen = {(g["name"], g["scale"], g["weight_decay"]): [list(p.shape) for p in g["params"]] for g in opt.param_groups}
    assert seen == {("body", 1.0, 0.1): [[4, 3]], ("body", 1.0, 0.0): [[4], [4]],
                    ("head", 0.5, 0.1): [[1, 4]], ("head", 0.5, 0.0): [[1]]}
    assert opt.param_groups[0]["betas"] == (0.9, 0.95)
    common.optimizer(named, groups)                                          # a list of named parameters does as well


def test_optimizer_groups_must_be_exactly_the_trainable_parameters():
    model = two_layers()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    every = list(model.named_parameters())
    for groups, message in (
            ([{"name": "a", "params": named[:-1], "lr": 1.0}], "1 trainable parameters are in no .*, first 2.bias"),
            ([{"name": x, "params": named, "lr": 1.0} for x in "ab"], "0.weight is in two optimiser groups, a and b"),
            ([{"name": "a", "params": every, "lr": 1.0}], "1.bias of optimiser group a is frozen"),
            ([{"name": "a", "params": [*named, ("z", nn.Parameter(torch.ones(1)))], "lr": 1.0}], "parameter z of")):
        with pytest.raises(RuntimeError, match=message):
            common.optimizer(model, groups)


def test_check_gradients_names_the_parameter():
    model = two_layers()
    model(torch.ones(2, 3)).sum().backward()
    common.check_gradients(model.named_parameters())
    model[1].bias.grad = torch.zeros(4)
    with pytest.raises(RuntimeError, match="1 frozen parameters got one: 1.bias"):
        common.check_gradients(model.named_parameters())
    model[1].bias.grad = model[2].weight.grad = None
    with pytest.raises(RuntimeError, match="1 trainable parameters got no gradient: 2.weight"):
        common.check_gradients(model.named_parameters())


def test_clip_returns_the_norm_from_before():
    def fresh():
        a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        return [a, b, c]                                                     # c has no gradient

    p = fresh()
    assert float(common.grad_norm(p)) == pytest.approx(5.0)
    assert common.clip(p, 0.0) == pytest.approx(5.0) and p[0].grad.tolist() == [3.0, 0.0]
    assert common.clip(p, 9.0) == pytest.approx(5.0) and p[0].grad.tolist() == [3.0, 0.0]
    assert common.clip(p, 1.0) == pytest.approx(5.0) and p[1].grad.tolist() == pytest.approx([0.0, 0.8])


def test_small_words():
    assert [common.human(n) for n in (7, 999, 1000, 52_002, 412_345_678, 999_999_999, 1.3e9, 6_738_415_616, 70e9)] == \
        ["7", "999", "1.0K", "52K", "412M", "1.0B", "1.3B", "6.7B", "70B"]
    assert [common.duration(s) for s in (0, 34, 59.6, 312, 3723)] == ["0:00", "0:34", "1:00", "5:12", "1:02:03"]


# ---------------------------------------------------------------- run folder

WORLD = common.World(torch.device("cpu"), torch.float32)


@dataclass
class RunConfig:
    init: str = "base"
    lr: float = 0.1
    targets: tuple[str, ...] = ("q", "v")
    overwrite: bool = False
    resume: bool = False


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log_line_and_files(tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])
    run = common.Run(tmp_path / "run", "sft", RunConfig(), WORLD)
    run.total = 200
    clock[0] += 24
    run.log(8, {"loss": torch.tensor(2.1134), "lr": 1e-4, "hidden": 1, "tokens_per_sec": 411.6, "bad": math.nan},
            show=("loss", "lr", "tokens_per_sec"))
    assert capsys.readouterr().out == "sft   8/200 (  4%) | loss  2.113 | lr 1.0e-04 |   412 tok/s | 0:24 | eta 9:36\n"
    clock[0] += 2
    run.log(200, {"n": 3}, tokens=50)
    assert capsys.readouterr().out == "sft 200/200 (100%) | n 3 |    25 tok/s | 0:26\n"
    run.sample(8, [{"prompt": "你好", "answer": "a"}])
    first, second = lines(run.dir / "metrics.jsonl")
    assert first == {"step": 8, "loss": pytest.approx(2.1134), "lr": 1e-4, "hidden": 1, "tokens_per_sec": 411.6,
                     "bad": None, "seconds": 24.0}
    assert second == {"step": 200, "n": 3, "tokens_per_sec": 25.0, "seconds": 26.0}
    assert '"你好"' in (run.dir / "samples.jsonl").read_text(encoding="utf-8")
    about = json.loads((run.dir / "config.json").read_text(encoding="utf-8"))
    assert about["stage"] == "sft" and about["config"]["targets"] == ["q", "v"]
    assert about["versions"]["torch"] == torch.__version__
    assert {"git", "command", "date", "device", "dtype", "ranks"} <= set(about)


def test_other_ranks_neither_write_nor_print(tmp_path, capsys):
    second = common.World(torch.device("cpu"), torch.float32, rank=1, size=2)
    run = common.Run(tmp_path / "run", "sft", RunConfig(), second)
    run.log(1, {"loss": 1.0})
    run.sample(1, [{"a": 1}])
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_run_is_not_overwritten_by_accident(tmp_path, capsys):
    out = tmp_path / "run"
    common.Run(out, "sft", RunConfig(), WORLD).log(1, {"loss": 1.0})
    for folder in ("model", "adapter", "policy", "value"):       # a stale one would be what chat.py talks to
        (out / folder).mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(common.UserError, match="--resume goes on with it, --overwrite replaces it"):
        common.Run(out, "sft", RunConfig(), WORLD)
    assert len(lines(out / "metrics.jsonl")) == 1 and (out / "model").exists()
    with pytest.raises(common.UserError, match="would delete .*model"):      # the run would eat what it starts from
        common.Run(out, "sft", RunConfig(init=str(out / "model"), overwrite=True), WORLD)
    assert (out / "model").exists()
    common.Run(out, "sft", RunConfig(overwrite=True), WORLD)
    assert {path.name for path in out.iterdir()} == {"notes.txt", "config.json", "state"}    # the notes are not ours
    stray = tmp_path / "stray"
    (stray / "model").mkdir(parents=True)
    with pytest.raises(common.UserError, match="holds model but is no run"):
        common.Run(stray, "sft", RunConfig(overwrite=True), WORLD)


def test_resume_tells_what_changed_and_refuses_what_cannot_fit(tmp_path, capsys):
    out = tmp_path / "run"
    common.Run(out, "sft", RunConfig(), WORLD)
    common.Run(out, "sft", RunConfig(lr=0.2, resume=True), WORLD, resume=True)
    assert capsys.readouterr().out == "resuming: --lr was 0.1 and is now 0.2\n"
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert about["config"]["lr"] == 0.2 and [s["config"]["lr"] for s in about["sessions"]] == [0.1]
    with pytest.raises(common.UserError, match="--init was 'base' and is now 'other'"):
        common.Run(out, "sft", RunConfig(init="other", lr=0.2), WORLD, resume=True)
    with pytest.raises(common.UserError, match="stage was sft and is now ppo"):
        common.Run(out, "ppo", RunConfig(lr=0.2), WORLD, resume=True)
    with pytest.raises(common.UserError, match="ranks was 1 and is now 2"):
        common.Run(out, "sft", RunConfig(lr=0.2), common.World(torch.device("cpu"), torch.float32, 0, 2), resume=True)
    common.Run(tmp_path / "new", "sft", RunConfig(), WORLD, resume=True)
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"quant": "nf4"}, {"eval_prompts": 32}, {"lora_targets": ("q_proj",)},
                                    {"template": "chatml"}])
def test_a_run_does_not_go_on_over_another_base_or_other_data(tmp_path, change):
    """The adapter was trained on what the base computes in four bits; the prompts held out are not trained on."""
    common.Run(tmp_path, "ppo", ppo.Config(), WORLD)
    with pytest.raises(common.UserError, match=f"--{next(iter(change))} was .* and is now"):
        common.Run(tmp_path, "ppo", ppo.Config(**change), WORLD, resume=True)
    common.Run(tmp_path, "ppo", ppo.Config(one_pass=True, graph=True), WORLD, resume=True)  # these only round


def three_states(out: Path) -> common.Run:
    run = common.Run(out, "sft", RunConfig(), WORLD)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
        run.sample(step, [{"text": str(step)}])
        run.save_state(step, {"step": step, "weights": {"w": torch.full((1000,), float(step))}})
    run.log(4, {"loss": 4.0})
    return run


def test_the_last_two_states_are_kept_and_the_logs_cut_back(tmp_path, capsys):
    run = three_states(tmp_path / "run")
    assert [p.name for p in sorted((run.dir / "state").iterdir())] == ["step_00000002.pt", "step_00000003.pt"]
    again = common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True)
    saved = again.load_state()
    assert saved["step"] == 3 and float(saved["weights"]["w"][0]) == 3.0 and again.first == 3
    assert [row["step"] for row in lines(run.dir / "metrics.jsonl")] == [1, 2, 3]
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    run = three_states(tmp_path / "run")
    newest, older = run.dir / "state" / "step_00000003.pt", run.dir / "state" / "step_00000002.pt"

    def break_it(path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = data.find(np.full(8, float(path.stem[-1]), "f4").tobytes()) + 16        # inside the weights
        data[at] ^= 1
        path.write_bytes({"cut": bytes(data[:len(data) // 2]), "bit": bytes(data), "empty": b""}[damage])

    break_it(newest)
    saved = common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True).load_state()
    assert saved["step"] == 2 and [row["step"] for row in lines(run.dir / "metrics.jsonl")] == [1, 2]
    out = capsys.readouterr().out
    assert "step_00000003.pt is damaged" in out and "resuming from" in out
    break_it(older)
    with pytest.raises(common.UserError, match="No whole state is left"):
        common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True).load_state()
    assert len(lines(run.dir / "metrics.jsonl")) == 2                        # nothing was cut for it


def test_a_state_runs_no_code(tmp_path):
    run = three_states(tmp_path / "run")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for path in (run.dir / "state").iterdir():
        torch.save({"state": Evil()}, path)
    with pytest.raises(common.UserError, match="damaged"):
        common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True).load_state()
    assert not (tmp_path / "owned").exists()


def test_random_generators_continue(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))

    run = common.Run(tmp_path / "run", "sft", RunConfig(), WORLD)
    common.seed_all(3)
    draw()                                               # leaves half a pair in python's gauss generator
    run.save_state(1, {"step": 1}, per_rank={"own": 7})
    expected = draw()
    common.seed_all(4)
    assert common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True).load_state()["own"] == 7
    assert draw() == expected


def test_check_finite_stops_keeps_the_state_and_names_the_samples(tmp_path):
    run = common.Run(tmp_path / "run", "sft", RunConfig(), WORLD)
    common.check_finite({"loss": 1.0, "norm": torch.tensor(1e38)}, 4, ["d.jsonl:1"], run, {"step": 4})
    assert not (run.dir / "state" / "before_nan.pt").exists()
    with pytest.raises(common.NonFinite) as stop:
        bad = {"loss": 1.0, "gradient norm": torch.tensor(math.inf)}
        common.check_finite(bad, 4, ["d.jsonl:1", "d.jsonl:9"], run, {"step": 4})
    for part in ("step 4: gradient norm is inf", "d.jsonl:1, d.jsonl:9", "before_nan.pt", "--dtype fp32", "lower --lr"):
        assert part in str(stop.value), part
    assert common.read_state(run.dir / "state" / "before_nan.pt") == {"state": {"step": 4}}
    again = common.Run(run.dir, "sft", RunConfig(), WORLD, resume=True)
    assert again.load_state() is None                                        # it is not a state to go on from


def test_gate(tmp_path, capsys):
    run = common.Run(tmp_path / "run", "sft", RunConfig(), WORLD)
    assert common.gate("sft", [("held-out loss", True, "2.31 -> 1.42"), ("end tokens", True, "98 %")], "read this", run)
    assert capsys.readouterr().out == "GATE sft PASS  held-out loss 2.31 -> 1.42 | end tokens 98 %\n"
    failed = common.gate("sft", [("a", True, "1"), ("b", torch.tensor(False), "2")], "read this", run_dir=run.dir)
    assert failed is False
    assert capsys.readouterr().out == "GATE sft FAIL  a 1 | FAILED: b 2\n  what to do: read this\n"
    gate = json.loads((run.dir / "gate.json").read_text(encoding="utf-8"))
    assert gate["passed"] is False and gate["checks"][1] == {"name": "b", "ok": False, "figure": "2"}


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    common.atomic_write(path, "old é")
    with pytest.raises(ZeroDivisionError), common.atomic(path) as file:
        file.write(b"ne")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old é"


# ---------------------------------------------------------------- kill -9 at any moment

STEPS = 14


def train(out: str, resume: bool) -> None:
    """A small training that draws from all random generators and saves every third step."""
    common.seed_all(1)
    model = nn.Linear(20, 20)
    opt = common.optimizer(model, [{"name": "all", "params": list(model.named_parameters()), "lr": 1.0}])
    run = common.Run(out, "sft", RunConfig(resume=resume), WORLD, resume=resume)
    run.total, step = STEPS, 0
    if resume and (saved := run.load_state()):
        step = saved["step"]
        opt.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
    while step < STEPS:
        x = torch.randn(4, 20) * random.random() + float(np.random.randn())
        loss = (model(x) - x).square().mean()
        loss.backward()
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step, STEPS, 0.01) * group["scale"]
        opt.step()
        opt.zero_grad()
        step += 1
        run.sample(step, [{"text": f"sample {i} of step {step}"} for i in range(3)])
        run.log(step, {"loss": loss.item()})
        time.sleep(0.005)
        if step % 3 == 0 or step == STEPS:
            run.save_state(step, {"step": step, "optimizer": opt.state_dict(), "model": model.state_dict()})
    common.atomic_write(Path(out) / "final.json", json.dumps(model.weight.flatten().tolist()))


def die_at(name: str, count: int):
    """Replaces a function by one that dies at its count-th call: before it, or half through what it writes."""
    owner, attribute = {"save": (torch, "save"), "append": (common.Run, "append"), "truncate": (os, "truncate"),
                        "unlink": (Path, "unlink")}.get(name, (os, name))
    original, calls = getattr(owner, attribute), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if name == "save":                                               # half a state lies in the temporary file
                args[1].write(b"PK half a state")
                args[1].flush()
            if name == "append":                                             # half a line lies in the log
                with open(args[0].dir / args[1], "a", encoding="utf-8") as file:
                    file.write('{"step": 99, "lo')
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, attribute, wrapped)


def drive(function: str, folder: Path) -> str:
    """Runs a function of this file in a process of its own; what it printed."""
    command = [sys.executable, __file__, function, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def child(work) -> int:
    """Forks, runs work() in the child, returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:           # a child must never come back into its parent's code
            print(f"child failed: {error!r}", file=sys.stderr)
            os._exit(1)
    return pid


def kill_driver(folder: str) -> None:
    """Trains once in peace, then again and again with a death in between, each until it ends."""
    torch.set_num_threads(1)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])            # torch's late imports, once for all children
    assert os.waitpid(child(lambda: train(f"{folder}/peace", False)), 0)[1] == 0
    places = [("save", 1), ("save", 3), ("fsync", 2), ("fsync", 9), ("replace", 1), ("replace", 2), ("replace", 4),
              ("unlink", 1), ("append", 9), ("append", 14)]
    for i, (name, count) in enumerate(places):
        def dying(name=name, count=count, i=i):
            die_at(name, count)
            train(f"{folder}/{i}", False)
        assert os.waitpid(child(dying), 0)[1] == signal.SIGKILL, (name, count)
        again = [("append", 5), ("truncate", 1)][i % 2]                      # the resumed process is killed as well

        def dying_again(again=again, i=i):
            die_at(*again)
            train(f"{folder}/{i}", True)
        os.waitpid(child(dying_again), 0)
        assert os.waitpid(child(lambda i=i: train(f"{folder}/{i}", True)), 0)[1] == 0, (name, count)
    dice = random.Random(0)
    for i in range(len(places), len(places) + 6):                            # and at moments that nobody chose
        for resume in (False, True, True):
            pid = child(lambda i=i, resume=resume: train(f"{folder}/{i}", resume))
            time.sleep(dice.uniform(0.005, 0.12))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert os.waitpid(child(lambda i=i: train(f"{folder}/{i}", True)), 0)[1] == 0, i


def timeless(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(path)]


def test_kill_9_at_any_moment_then_resume_equals_an_uninterrupted_run(tmp_path):
    drive("kill_driver", tmp_path)
    peace, killed = tmp_path / "peace", [p for p in tmp_path.iterdir() if p.name != "peace"]
    assert len(killed) == 16 and len(timeless(peace / "metrics.jsonl")) == STEPS
    for run in killed:
        for log in common.LOGS:
            assert timeless(run / log) == timeless(peace / log), (run, log)
        assert (run / "final.json").read_bytes() == (peace / "final.json").read_bytes(), run
        assert not list(run.rglob("*.tmp")) and len(list((run / "state").iterdir())) == 2


# ---------------------------------------------------------------- two ranks

def rank_work(folder: str) -> None:
    world = common.setup("cpu", "fp32", seed=0)
    r = world.rank
    assert common.all_sum(1 + r) == 3 and type(common.all_sum(1 + r)) is int
    assert common.all_sum(0.5 + r) == 2.0 and type(common.all_sum(0.5)) is float
    assert common.all_sum(2**40 + 1) == 2 * (2**40 + 1)                      # an int does not pass through fp32
    x = torch.tensor([1.0, 2.0]) * (r + 1)
    assert common.all_sum(x).tolist() == [3.0, 6.0] and x.tolist() == [1.0 + r, 2.0 + 2 * r]       # x itself stays

    # gradients of several dtypes, in buckets of 8 numbers and in one
    for bucket in (8, 2**24):
        kinds = [((3, 4), "float32"), ((5,), "float32"), ((2,), "bfloat16"), ((1, 6), "float32"), ((), "float32")]
        params = [nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape, dtype in kinds]
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, float(i + 1) * (10 if r else 1))
        common.sync_gradients(params if r else [(f"p{i}", p) for i, p in enumerate(params)], bucket)
        for i, p in enumerate(params):
            assert bool((p.grad == 11 * (i + 1)).all()), (bucket, i, p.grad)
    try:
        common.sync_gradients([("weight.of.x", nn.Parameter(torch.zeros(2)))])
    except RuntimeError as error:
        assert "weight.of.x" in str(error) and f"rank {r}" in str(error)
    else:
        raise AssertionError("a missing gradient went unnoticed")

    # each rank gets its own generators and its own things back
    run = common.Run(f"{folder}/run", "sft", RunConfig(), world)
    common.seed_all(0 + 100003 * r)
    run.save_state(1, {"step": 1}, per_rank={"own": r})
    expected = float(torch.rand(()))
    common.seed_all(5)
    common.barrier()
    saved = common.Run(f"{folder}/run", "sft", RunConfig(), world, resume=True).load_state()
    assert saved == {"step": 1, "own": r} and float(torch.rand(())) == expected
    assert common.gate("sft", [("a", True, "1")], run=run)
    both = torch.zeros(2)
    both[r] = expected
    both = common.all_sum(both)
    assert both[0] != both[1]
    common.barrier()

    if r == 0:                                                               # the other rank leaves: say who waited
        time.sleep(0.3)
        try:
            common.all_sum(1)
        except RuntimeError as error:
            assert "rank 0 of 2 waited in vain" in str(error), error
        else:
            raise AssertionError("a rank that left went unnoticed")


def rank_driver(folder: str) -> None:
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def work(rank: int):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        rank_work(folder)
    pids = [child(lambda rank=rank: work(rank)) for rank in range(2)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0, 0], codes


def test_two_ranks(tmp_path):
    out = drive("rank_driver", tmp_path)
    assert out.count("device cpu") == 1 and out.count("GATE") == 1           # rank 0 alone speaks


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
