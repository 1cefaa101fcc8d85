"""Mutation testing of the maths: every small change of these functions must turn a certificate or a test red.

One mutant is one change: an operator swapped or one side of it dropped, a constant or a default moved, a comparison
turned, a condition negated or taken for granted, a statement, a loop, a return or a `with` deleted, two arguments
exchanged, min and max exchanged. A mutant is first put in the place of the function and judged by the cheapest
certificates; one that survives them is written into a copy of the repository, where the tests of its file run, and then
judged by the other certificates. All of them must be green with the function unchanged. What survives is listed; it
must be explained or killed.

    python course/mutants.py                   # -> docs/results/mutants.json, mutants.md   (half an hour; make mutants)
    python course/mutants.py --only ppo.gae,ppo.whiten         # anew; the others keep their record
"""
import ast
import copy
import functools
import inspect
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from course import certificates, record  # noqa: E402
from data import batch as data_batch  # noqa: E402
from data import chat  # noqa: E402

ROOT = record.ROOT
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
    only: tuple[str, ...] = ()         # functions; empty: all
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
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield from node.values
    elif isinstance(node, ast.If):
        for test in (ast.UnaryOp(ast.Not(), node.test), ast.Constant(True), ast.Constant(False)):
            yield ast.If(test, node.body, node.orelse)
    elif isinstance(node, ast.With):
        yield ast.If(ast.Constant(True), node.body, [])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
    elif isinstance(node, ast.Call) and len(node.args) >= 2:
        for i in range(len(node.args) - 1):
            args = list(node.args)
            args[i], args[i + 1] = args[i + 1], args[i]
            yield ast.Call(node.func, args, node.keywords)
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.For, ast.Raise)):
        yield ast.Pass()


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the changed function) for every mutant that compiles and differs. Types, the words of errors
    and docstrings are left alone. A default that is a word becomes one of those that the function asks for."""
    tree = ast.parse(textwrap.dedent(source))
    plain, seen, args = ast.unparse(tree), set(), tree.body[0].args
    kept = {id(n) for part in [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [tree.body[0].returns]),
                               *(n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc)]
            for n in ast.walk(part)}
    asked = {n.value: n for c in ast.walk(tree) if isinstance(c, ast.Compare) for n in ast.walk(c)
             if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    words = {id(n) for n in args.defaults if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for node in (n for n in ast.walk(tree) if id(n) not in kept and not is_docstring(n)):
        for other in (asked.values() if id(node) in words else variants(node)):
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
    mutant = type(function)(function.__code__, vars(module), attribute, function.__defaults__)
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


def by_tests(module, text: str) -> str:
    """The first test that fails with this text as the module, in a copy of the repository, or ''."""
    file = Path(module.__file__).relative_to(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "copy"
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "docs", "demo"))
        (copied / file).write_text(text, encoding="utf-8")
        slow = "tests/test_ppo.py::test_it_learns_to_write_a_token"        # no proof of a detail, and it takes long
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--deselect", slow, *TESTS[module.__name__]]
        try:
            done = subprocess.run(command, cwd=copied, capture_output=True, text=True, encoding="utf-8", timeout=900)
        except subprocess.TimeoutExpired:
            return "time"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0].split("::")[-1] if failed else ("" if done.returncode == 0 else "crash")


@functools.cache
def sound(module) -> str:
    """The text of the module, if its tests pass in a copy as it is."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert not (red := by_tests(module, text)), f"{red} of {TESTS[module.__name__]} fails without any change"
    return text


@functools.cache
def accepted(module, name: str, source: str) -> None:
    """The function itself, compiled as its mutants are, passes all certificates."""
    red = by_certificates(module, name, ast.unparse(ast.parse(textwrap.dedent(source))), list(certificates.FAST))
    assert not red, f"{red} fails with {name} as it is"


# ---------------------------------------------------------------- the run

def judge(module_name: str, name: str, source: str, what: str, text: str) -> dict[str, str]:
    """Who kills this mutant, or ''. In a process of its own: certificates look at the module in place."""
    module = sys.modules[module_name]
    accepted(module, name, source)
    killer = by_certificates(module, name, text, list(CHEAP))
    if not killer:
        assert source in (whole := sound(module)), f"{name} is not in {module.__file__} as it was read"
        indent = source[:len(source) - len(source.lstrip())]
        killer = by_tests(module, whole.replace(source, textwrap.indent(text, indent) + "\n"))
    dear = [title for title in certificates.FAST if title not in CHEAP]
    return {"change": what, "killed by": killer or by_certificates(module, name, text, dear)}


def parts() -> dict[str, list]:
    """{function: its mutants}"""
    found = {}
    for module, name in TARGETS:
        owner = getattr(module, name.split(".")[0])
        source = inspect.getsource(getattr(owner, name.split(".")[1]) if "." in name else owner)
        source = source[source.index("def "):] if not source.startswith(" ") else source
        found[f"{module.__name__}.{name}"] = [(judge, (module.__name__, name, source, *mutant))
                                              for mutant in mutants(source)]
    return found


NONE = "**unexplained**"


def explanation(function: str, change: str) -> str:
    """By function and change; the line may move."""
    return EXPLAINED.get(f"{function}: {change.split(': ', 1)[1]}", NONE)


def survivors(recorded: dict) -> list[tuple[str, str]]:
    return [(name, r["change"]) for name, part in recorded.items() for r in part["rows"] if not r["killed by"]]


def share(recorded: dict) -> tuple[int, int]:
    rows = [r for part in recorded.values() for r in part["rows"]]
    return sum(bool(r["killed by"]) for r in rows), len(rows)


def table(recorded: dict) -> str:
    killed, total = share(recorded)
    lines = ["# Mutants of the maths", "", f"Made by `make mutants`: {killed} of {total} mutants killed "
             f"({killed / total:.1%}).", "",
             "| function | mutants | by certificates | by tests | survive | date, code |",
             "|---|---|---|---|---|---|"]
    for name, part in recorded.items():
        killers = [r["killed by"] for r in part["rows"]]
        certified = sum(k in certificates.FAST for k in killers)
        lines.append(f"| `{name}` | {len(killers)} | {certified} | {sum(map(bool, killers)) - certified} | "
                     f"{killers.count('')} | {part['date']}, {part['code']} |")
    lines += ["", "| survivor | why |", "|---|---|"]
    for name, change in survivors(recorded):
        key = f"{name}: {change}".replace("|", "\\|")
        lines.append(f"| {key} | {explanation(name, change)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> bool:
    file = Path(cfg.out_dir) / "mutants.json"
    made_by = record.stamp(*sorted((ROOT / "tests").glob("*.py")))
    fresh, recorded = record.run(file, parts(), cfg.only, cfg.workers, made_by)
    common.atomic_write(file.with_suffix(".md"), table(recorded))
    killed, total = share(fresh)
    free = [change for change in survivors(fresh) if explanation(*change) == NONE]
    return common.gate("mutants", [("95 % killed", killed >= 0.95 * total, f"{killed} of {total}"),
                                   ("survivors explained", not free, f"{len(free)} are not")])


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
