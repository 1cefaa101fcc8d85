"""docs/systems.md and its Chinese twin: both say the same, every command line is one that works, and every state names
the test that proves it.
"""
import ast
import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from remote_cases import CASES
from test_families import MODELS

import chat
import checkpoints
import common
import ppo
import reward
import sft
from checkpoints import __main__ as cli
from checkpoints import families, hub
from data.chat import FORMATS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}
STATES = {"verified against reference": "已对照参考实现验证",
          "verified on a sample in its format": "已在其格式的样本上验证",
          "needs weights that were never public": "所需权重从未公开", "closed: nothing to load": "闭源: 无可加载"}
OTHERS = {"test_t5.py": {"t5", "mt5"}, "test_rwkv.py": {"rwkv"}, "test_cpm.py": {"cpmant"}}


@dataclass
class Row:
    system: str
    base: str
    commands: list[str]
    state: str
    proof: list[str]                   # test cases


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def cells(name: str, columns: int) -> list[list[str]]:
    """The rows of all tables with this many columns, their heads included."""
    lines = [line.strip("|").split("|") for line in text(name).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


def rows(name: str, heads: tuple[str, ...]) -> list[Row]:
    found = []
    for system, base, _, _, command, state in cells(name, 6):
        if system not in heads:
            kind = next((s for s in (*STATES, *STATES.values()) if state.startswith(s)), state)
            found.append(Row(system, base, code(command), kind, code(state)))
    return found


ROWS, ROWS_ZH = rows("systems.md", ("System",)), rows("systems_zh.md", ("系统",))
COMMANDS = [command for row in ROWS for command in row.commands]


# ---------------------------------------------------------------- the two languages

def test_the_survey_is_complete():
    open_ones = [row for row in ROWS if "closed" not in row.state]
    assert len(open_ones) >= 61 and len(ROWS) - len(open_ones) >= 15
    assert len({row.system for row in ROWS}) == len(ROWS)


def test_both_languages_say_the_same():
    assert len(ROWS) == len(ROWS_ZH)
    for ours, theirs in zip(ROWS, ROWS_ZH):
        pair = f"{ours.system} / {theirs.system}"
        assert ours.commands == theirs.commands and code(ours.base) == code(theirs.base), pair
        assert ours.proof == theirs.proof and STATES.get(ours.state) == theirs.state, pair
    for columns in (2, 3):
        both = [[[code(cell) for cell in line] for line in cells(name, columns)] for name in (
            "systems.md", "systems_zh.md")]
        assert both[0] == both[1] and both[0]
    heads = [re.findall(r"^#+", text(name), flags=re.M) for name in ("systems.md", "systems_zh.md")]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("name", ["systems.md", "systems_zh.md", "families.md", "families_zh.md"])
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)", text(name)) if not link.startswith("http")]
    assert links and all((ROOT / "docs" / link).exists() for link in links), links


def test_families_quotes_the_code_as_it_is():
    """The diff that docs/families.md shows is in the files, line by line, and the Chinese page shows the same."""
    blocks = re.findall(r"```diff\n(.*?)```", text("families.md"), flags=re.S)
    assert blocks and blocks == re.findall(r"```diff\n(.*?)```", text("families_zh.md"), flags=re.S)
    source = ""
    for line in "".join(blocks).splitlines():
        if line.startswith("# "):
            source = (ROOT / line[2:]).read_text(encoding="utf-8")
        else:
            assert line[1:] in source.splitlines(), line
    fields = set(re.findall(r"^    (\w+): ", (ROOT / "checkpoints/readers.py").read_text(encoding="utf-8"), flags=re.M))
    named = [name for row in cells("families.md", 3) for name in code(row[0]) if name != "Family"]
    assert len(named) >= 8 and set(named) <= fields
    assert [code(row[0]) for row in cells("families.md", 3)] == [code(row[0]) for row in cells("families_zh.md", 3)]


# ---------------------------------------------------------------- names and states

@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.system)
def test_state(row):
    """What is verified names its tests, and they are tests of the very families that the commands load."""
    if row.state == "closed: nothing to load":
        assert not row.commands and not row.proof
        return
    assert row.state in STATES and row.commands
    if row.state.startswith("needs"):
        return
    bases = code(row.base)
    assert bases and set(bases) <= set(hub.NAMES), set(bases) - set(hub.NAMES)
    proven = set().union(*(family_of(proof, row.state) for proof in row.proof))
    loaded = {hub.family(init) for init in map(init_of, row.commands) if not init.startswith("out/")}
    assert loaded <= proven, f"{loaded - proven} is loaded, and no test of the row is about it"
    if ".." not in row.base and not proven & {"t5", "mt5"}:      # a range of names holds families between its ends
        assert loaded <= {hub.family(base) for base in bases} and proven == {hub.family(base) for base in bases}


def family_of(proof: str, state: str) -> set[str]:
    """The families that a test case is about."""
    if proof.startswith("tests/"):
        file, _, function = proof.partition("::")
        defined = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert function in {node.name for node in defined if isinstance(node, ast.FunctionDef)}, proof
        return OTHERS[Path(file).name]
    if state == "verified against reference":
        import transformers
        kind = MODELS[proof][0]
        config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else kind + "Config")
        return {families.find({"model_type": config.model_type})[0]}
    return {families.find(CASES[proof].raw)[0]}


def init_of(command: str) -> str:
    words = shlex.split(command)
    return words[words.index("--init") + 1] if "--init" in words else words[2]


# ---------------------------------------------------------------- command lines

def chains() -> list[tuple[str, str, str]]:
    """(system, command, public name that its --init goes back to): a stage starts from the model of an earlier one."""
    found = []
    for row in ROWS:
        made: dict[str, str] = {}                          # out_dir/model -> the public base it comes from
        for command in row.commands:
            words, base = shlex.split(command), init_of(command)
            options = dict(zip(words, words[1:]))
            for flag in ("--init", "--reward"):
                if options.get(flag, "").startswith("out/"):
                    assert options[flag] in made, f"{row.system}: nothing made {options[flag]}"
            base = made.get(base, base)
            made[options.get("--out_dir", "") + "/model"] = base
            found.append((row.system, command, base))
    return found


@pytest.mark.parametrize("system, command, base", chains(), ids=[f"{s}-{c.split()[1]}" for s, c, _ in chains()])
def test_dry_run(system, command, base):
    """As typed, but for a base that an earlier line of the row would have made, and on the CPU."""
    python, script, *argv = shlex.split(command)
    assert python == "python"
    if script == "chat.py":                                # has no dry run: it must understand the line
        assert chat.arguments(argv).model == base and base in hub.NAMES
        return
    module = SCRIPTS[script]
    as_typed = common.parse(module.Config, argv)
    assert as_typed.template in ("", *FORMATS), as_typed.template
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        argv[argv.index("--init") + 1] = base
        module.main(common.parse(module.Config, [*argv, "--dry_run", "--device", "cpu", "--dtype", "bf16"]))
    parameters = int(re.search(r"\(([\d,]+)\)", out.getvalue())[1].replace(",", ""))
    assert parameters == cli.parameters(hub.config(base)) and "peak" in out.getvalue()
    how = f"LoRA r = {as_typed.lora_r}" if as_typed.lora_r else "every weight trained"
    assert how in out.getvalue()


def test_convert_lines(monkeypatch):
    """Of the table of adapters and deltas: understood by the command line, and of a base that is known."""
    seen = []
    monkeypatch.setattr(cli, "convert", lambda *args: seen.append(args))
    lines = [code(line[2])[0] for line in cells("systems.md", 3) if code(line[2])]
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "checkpoints"]
        cli.main(words[3:])
        base, out, adapters, delta, new_rows, _ = seen[-1]
        assert base in hub.NAMES and out.parts[0] == "out" and bool(adapters) != bool(delta)
    assert len(seen) == len(lines) >= 6 and {call[4] for call in seen} == {None, "zero", "mean"}


def test_a_wrong_flag_or_name_is_seen():
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        common.parse(sft.Config, ["--targets", "q_proj"])
    with pytest.raises(common.UserError, match="c_attn"):
        sft.main(common.parse(sft.Config, ["--init", "llama-7b", "--lora_targets", "c_attn", "--dry_run"]))
    assert checkpoints.our_linears("chatglm-6b", ("query_key_value", "dense")) == (
        "q_proj", "k_proj", "v_proj", "o_proj")
