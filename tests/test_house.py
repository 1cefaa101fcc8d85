"""The rules of the house: who may import whom, what importing must not do, and that the documents say what is so."""
import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Reading order: a file imports only what stands before it, plus the leaves.
ORDER = ["sampling", "model", "lora", "data", "sft", "reward", "ppo"]
LEAVES = {"common", "memory", "checkpoints", "kernels"}
ALLOWED = {"torch", "numpy", "safetensors", "sentencepiece", "tiktoken", "regex", "jinja2"}
OPTIONAL = {"demo.py": {"vaderSentiment"}, "bench.py": {"transformers", "peft"},
            "bench_recipe.py": {"transformers", "peft"},
            "data/tokenizer_makers.py": {"jieba"},
            "kernels/backend.py": {"triton"}, "kernels/e2e_ppo.py": {"peft"},
            "kernels/e2e.py": {"transformers", "peft", "liger_kernel", "bitsandbytes"},
            "kernels/bench_rows.py": {"liger_kernel", "trl", "cut_cross_entropy"},
            "checkpoints/__init__.py": {"huggingface_hub"}}
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("checkpoints/*.py"),
                             *ROOT.glob("kernels/*.py")])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_before_it(name):
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py"))
    ours = {p.stem for p in ROOT.glob("*.py")} | {"data", "checkpoints", "kernels"}
    before = set(ORDER[:ORDER.index(name)]) | LEAVES | {name}
    assert files
    for file in files:
        wrong = sorted((imports(file) & ours) - before)
        assert not wrong, f"{file.name} imports {wrong}, which stands behind it"


def test_the_core_depends_on_seven_packages():
    ours = {p.stem for p in ROOT.glob("*.py")} | {"data", "checkpoints", "kernels", "course"}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        foreign = imports(path) - ours - set(sys.stdlib_module_names) - ALLOWED - OPTIONAL.get(name, set())
        assert not foreign, f"{name} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_files_are_opened_as_utf_8(path):
    """On a Chinese Windows the default is GBK. open(), read_text() and write_text() must name the encoding, or be
    binary."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func,
                                          ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        binary = any(isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value for a in node.args[1:])
        method = isinstance(node.func, ast.Attribute)
        if name in ("open", "read_text", "write_text") and not binary and not (name == "open" and method):
            assert any(k.arg == "encoding"
                       for k in node.keywords), f"{path.name}:{node.lineno}: {name}() without encoding"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_read_as_the_style_asks(path):
    """A module docstring, lines of at most 120 characters, functions of at most 60 lines (main: 150, in ppo.py 200)."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for i, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 120, f"{path.name}:{i}: {len(line)} characters"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            n, most = node.end_lineno - node.lineno + 1, 60
            if node.name == "main":
                most = 200 if path.name == "ppo.py" else 150
            assert n <= most, f"{path.name}:{node.lineno}: {node.name} has {n} lines"


def test_importing_has_no_side_effects():
    """No output, no seed, no process group, no file; and every module is importable from another folder."""
    modules = [p.stem for p in ROOT.glob("*.py")] + ["data.batch", "data.chat", "data.formats", "data.tokenizer",
                                                     "checkpoints", "checkpoints.gguf"]
    code = "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; before = torch.get_rng_state()",
                      *[f"import {m}" for m in modules], "assert torch.equal(before, torch.get_rng_state())",
                      "assert not torch.cuda.is_initialized()"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
                          cwd=ROOT.anchor)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stdout + done.stderr


def test_what_is_installed_are_the_tracked_files():
    """A module that setuptools is not told of is missing after pip install, and with it all that import it."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                             check=True).stdout.split()
    assert sorted(told["py-modules"]) == sorted(Path(f).stem for f in tracked if "/" not in f)
    assert sorted(told["packages"]) == sorted({str(Path(f).parent) for f in tracked if "/" in f} - {"tests"})


# ---------------------------------------------------------------- documents

def sections(name: str) -> list[str]:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"^(#+) ", text, flags=re.M)


def commands(name: str) -> list[str]:
    """Every line of a code block that is a command."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()
            if re.match(r"(python|make|torchrun|\.venv)", line)]


def test_both_readmes_have_the_same_sections_commands_tables_and_figures():
    assert sections("README.md") == sections("README_zh.md")
    assert commands("README.md") == commands("README_zh.md") and len(commands("README.md")) > 5
    rows = [len(re.findall(r"^\|", (ROOT / name).read_text(encoding="utf-8"), flags=re.M))
            for name in ("README.md", "README_zh.md")]
    assert rows[0] == rows[1]
    figures = [sorted(re.findall(r"\d+\.\d+", (ROOT / name).read_text(encoding="utf-8")))
               for name in ("README.md", "README_zh.md")]
    assert figures[0] == figures[1], set(figures[0]) ^ set(figures[1])


def test_files_named_in_the_readme_exist_with_their_line_counts():
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http"):
                assert (ROOT / link).exists(), f"{name} links to {link}"
        counts = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, flags=re.M)
        assert len(counts) >= 10
        for file, n in counts:
            lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
            assert abs(int(n) - lines) <= 0.05 * lines + 5, f"{name}: {file} has {lines} lines, the table says {n}"


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_flags_in_the_readme_exist(name):
    """Each `python script.py --flag` of the documents is known to that script's Config."""
    for line in commands(name):
        if m := re.search(r"(sft|reward|ppo|demo)\.py(.*)", line):
            fields = set(re.findall(r"^    (\w+): ", (ROOT / f"{m[1]}.py").read_text(encoding="utf-8"), flags=re.M))
            for flag in re.findall(r"--([\w-]+)", m[2]):
                assert flag.replace("-", "_") in fields, f"{name}: {line}: no flag --{flag}"
