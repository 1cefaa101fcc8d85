"""Mutation testing of the maths: every small change of these functions must turn a certificate or a test red.

One mutant is one change: an operator swapped or one side of it dropped, a constant moved, a comparison turned, a
condition negated, a statement deleted, two arguments exchanged, min and max exchanged. A mutant is first put in the
place of the function and judged by the cheapest certificates; one that survives them is written into a copy of the
repository, where the tests of its file run, and then judged by the other certificates. What survives all of them is
listed; it must be explained or killed.

    python course/mutants.py                   # -> docs/results/mutants.json, mutants.md   (an hour; make mutants)
    python course/mutants.py --only gae,whiten
"""
import ast
import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from course import certificates  # noqa: E402
from data import batch as data_batch  # noqa: E402
from data import chat  # noqa: E402

TARGETS = [(ppo, name) for name in (
    "gae", "policy_loss", "value_loss", "whiten", "kl", "AdaptiveKL.update", "logprobs", "token_logprobs",
    "response_mask", "final_scores", "token_rewards", "credit", "response_values", "policy_logprobs", "cut")]
TARGETS += [(sft, "loss"), (sft, "nll"), (sft, "collate"), (reward, "last_real"), (reward, "pair_loss"),
            (reward, "ranking_loss"), (data_batch, "pad"), (data_batch, "pack"), (chat, "encode_pieces")]
TESTS = {"ppo": ["tests/test_ppo.py"], "sft": ["tests/test_sft.py"], "reward": ["tests/test_reward.py"],
         "data.batch": ["tests/test_batch.py"], "data.chat": ["tests/test_chat.py"]}
# Survivors that compute the same, and why. Written by hand after reading them; anything else is a hole.
EXPLAINED: dict[str, str] = {
    "ppo.gae: 'torch.zeros_like' -> 'torch.ones_like'": "every column is written in the loop",
    "ppo.gae: '0' -> '-1'": "only the shape of a column is taken",
    "ppo.policy_loss: 'torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip,' -> "
    "'torch.maximum(-advantages * ratio.clamp(1 - clip, 1 + clip), -advantag'": "a maximum has no order",
    "ppo.policy_loss: '(ratio - 1).abs() > clip' -> '(ratio - 1).abs() >= clip'":
    "a statistic: at equality the clip changes nothing, and a float is never just there",
    "ppo.value_loss: 'torch.maximum(plain, clipped)' -> 'torch.maximum(clipped, plain)'": "a maximum has no order",
    "ppo.credit: 'kernel_gae.gae if use_triton(rewards) else gae' -> 'gae if use_triton(rewards) else kernel_gae.gae'":
    "without a kernel kernels.gae is the same loop; on a GPU only the time differs",
    "sft.collate: '1' -> '0'": "document numbers that say 'one document': unneeded, and the same result",
    "data.batch.pack: '1' -> '2'": "the row in (n, -1) is only compared where n is equal, and is below every row",
    "data.batch.pack: '1' -> '0'": "(n, 0) is at or below the first row with this room, as (n, -1) is"}


@dataclass
class Config:
    # --- mutants ---
    only: tuple[str, ...] = ()         # functions, anew; empty: all that mutants.json does not hold yet
    again: bool = False                # all of them anew
    workers: int = 0                   # mutants at a time; 0: as many as there are cores
    out_dir: str = str(ROOT / "docs" / "results")


# ---------------------------------------------------------------- mutants

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS = {ast.Gt: (ast.GtE, ast.Lt), ast.Lt: (ast.LtE, ast.Gt), ast.GtE: (ast.Gt,), ast.LtE: (ast.Lt,),
               ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "argmax": "argmin", "any": "all",
         "all": "any", "zeros_like": "ones_like", "new_zeros": "new_ones", "exp": "expm1", "expm1": "exp"}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Other nodes for this one, each a mutant."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        yield node.left
        yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARISONS.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value * 2 + 0.1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
    elif isinstance(node, ast.Call) and len(node.args) >= 2:
        for i in range(len(node.args) - 1):
            args = list(node.args)
            args[i], args[i + 1] = args[i + 1], args[i]
            yield ast.Call(node.func, args, node.keywords)
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not is_docstring(node):
        yield ast.Pass()


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the changed function) for every mutant that compiles and differs. Types, defaults and
    docstrings are left alone."""
    tree = ast.parse(textwrap.dedent(source))
    plain, seen = ast.unparse(tree), set()
    kept = {id(n) for part in [tree.body[0].args, *filter(None, [tree.body[0].returns]),
                               *(n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc)]
            for n in ast.walk(part)}
    nodes = [n for n in ast.walk(tree) if id(n) not in kept and not is_docstring(n)]
    for node in nodes:
        for other in variants(node):
            class Swap(ast.NodeTransformer):
                def visit(self, current, node=node, other=other):
                    return other if current is node else self.generic_visit(current)

            changed = Swap().visit(shallow(tree, node))
            text = ast.unparse(ast.fix_missing_locations(changed))
            if text != plain and text not in seen:
                seen.add(text)
                line = getattr(node, "lineno", 0)
                yield f"line {line}: {ast.unparse(node)[:70]!r} -> {ast.unparse(other)[:70]!r}", text


def shallow(tree: ast.AST, keep: ast.AST) -> ast.AST:
    """A copy of the tree in which `keep` is still the same object, so that it can be found."""
    return copy.deepcopy(tree, {id(keep): keep})


# ---------------------------------------------------------------- judges

CHEAP = ("losses", "credit", "KL estimators", "adaptive KL", "fine-tuning")   # milliseconds; the others come last


def by_certificates(module, name: str, text: str, names_of: list[str]) -> str:
    """The certificate of these that the mutant breaks, or ''."""
    owner, attribute = (getattr(module, name.split(".")[0]), name.split(".")[1]) if "." in name else (module, name)
    real, names = vars(owner)[attribute], dict(vars(module))
    exec(compile(text, f"<mutant of {name}>", "exec"), names)
    function = names[attribute]
    mutant = type(function)(function.__code__, vars(module), attribute, real.__defaults__)
    mutant.__kwdefaults__ = real.__kwdefaults__
    setattr(owner, attribute, mutant)
    try:
        for title in names_of:
            try:
                certificates.FAST[title]()
            except Exception:              # a failed assertion or a crash: either way the mutant has been noticed
                return title
    finally:
        setattr(owner, attribute, real)
    return ""


def by_tests(module, source: str, text: str) -> str:
    """The first test that fails with the mutant in a copy of the repository, or ''."""
    file = Path(module.__file__).relative_to(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "copy"
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "docs", "demo"))
        indent = source[:len(source) - len(source.lstrip())]
        whole = (ROOT / file).read_text(encoding="utf-8")
        assert source in whole
        (copied / file).write_text(whole.replace(source, textwrap.indent(text, indent) + "\n"), encoding="utf-8")
        slow = "tests/test_ppo.py::test_it_learns_to_write_a_token"        # no proof of a detail, and it takes long
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--deselect", slow, *TESTS[module.__name__]]
        done = subprocess.run(command, cwd=copied, capture_output=True, text=True, encoding="utf-8", timeout=900)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0].split("::")[-1] if failed else ("" if done.returncode == 0 else "crash")


# ---------------------------------------------------------------- the run

def judge(module_name: str, name: str, source: str, text: str) -> str:
    """Who kills this mutant, or ''. In a process of its own: certificates look at the module in place."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    module = sys.modules[module_name]
    return (by_certificates(module, name, text, list(CHEAP)) or by_tests(module, source, text) or
            by_certificates(module, name, text, [c for c in certificates.FAST if c not in CHEAP]))


def measure(cfg: Config, file: Path, pool: ProcessPoolExecutor) -> list[dict]:
    """Function by function, kept in the file; what is in it is not run again, unless --only names it."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not cfg.again else []
    rows = [row for row in rows if row["name"] not in cfg.only]
    for module, name in TARGETS:
        if (cfg.only and name not in cfg.only) or any(r["function"] == f"{module.__name__}.{name}" for r in rows):
            continue
        owner = getattr(module, name.split(".")[0])
        source = inspect.getsource(getattr(owner, name.split(".")[1]) if "." in name else owner)
        source = source[source.index("def "):] if not source.startswith(" ") else source
        found = [(what, pool.submit(judge, module.__name__, name, source, text)) for what, text in mutants(source)]
        for what, killer in found:
            rows.append({"function": f"{module.__name__}.{name}", "name": name, "change": what,
                         "killed by": killer.result()})
        mine = [row for row in rows if row["function"] == f"{module.__name__}.{name}"]
        print(f"{name:20} {sum(bool(r['killed by']) for r in mine):3} of {len(mine):3} killed", flush=True)
        common.atomic_write(file, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        for row in mine:
            if not row["killed by"]:
                print(f"    survives: {row['change']}", flush=True)
    return rows


NONE = "**unexplained**"


def explanation(row: dict) -> str:
    """By function and change; the line may move."""
    return EXPLAINED.get(f"{row['function']}: {row['change'].split(': ', 1)[1]}", NONE)


def table(rows: list[dict], note: str) -> str:
    lines = ["# Mutants of the maths", "", note, "", "| function | mutants | by certificates | by tests | survive |",
             "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["function"] for row in rows):
        mine = [row["killed by"] for row in rows if row["function"] == name]
        certified = sum(k in certificates.FAST for k in mine)
        lines.append(f"| `{name}` | {len(mine)} | {certified} | {sum(map(bool, mine)) - certified} | "
                     f"{mine.count('')} |")
    lines += ["", "| survivor | why |", "|---|---|"]
    for row in rows:
        if not row["killed by"]:
            key = f"{row['function']}: {row['change']}".replace("|", "\\|")
            lines.append(f"| {key} | {explanation(row)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> bool:
    warnings.simplefilter("ignore")
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(cfg.workers or os.cpu_count() or 1, get_context("spawn")) as pool:
        rows = measure(cfg, Path(cfg.out_dir) / "mutants.json", pool)
    killed = sum(bool(row["killed by"]) for row in rows)
    free = [row for row in rows if not row["killed by"] and explanation(row) == NONE]
    note = (f"Made by `python course/mutants.py`, {time.strftime('%Y-%m-%d')}: {killed} of {len(rows)} mutants killed "
            f"({killed / len(rows):.1%}).")
    common.atomic_write(Path(cfg.out_dir) / "mutants.md", table(rows, note))
    return common.gate("mutants", [("95 % killed", killed >= 0.95 * len(rows), f"{killed} of {len(rows)}"),
                                   ("survivors explained", not free, f"{len(free)} are not")])


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
