"""Mutation testing: one small change to a module at a time, each of which its own tests have to notice.

python tests/mutants.py damp losses            every mutant of two modules
python tests/mutants.py train --sample 60      60 of them, drawn with --seed
python tests/mutants.py views --match _boxes   those whose name holds a text
python tests/mutants.py views --again          those that nothing noticed in the last run of the whole module

A mutant that no test notices is an error, unless tests/equivalent_mutants.toml says why nobody could.
Counts of a module that was tried whole go to benchmarks/mutants.json, with the names of those that nothing noticed.
It runs in a copy of the checkout and in a fork of a process that has imported torch and the rest already.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
EQUIVALENT = ROOT / "tests/equivalent_mutants.toml"
COUNTS = ROOT / "benchmarks/mutants.json"
MODULES = ("damp", "losses", "metrics", "views", "labelers", "methods", "bank", "checkpoints", "data")
MODULES += ("batches", "evidence", "train")
TESTS = {"data": ("data", "hostile_data")}  # where its own test file is not all of them
COPIED = ("aevlp", "tests", "benchmarks", "pyproject.toml", "settings.ini")
LINKED = ("data", "nbs", "docs", "figures")
OTHER = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}


def changes(node):
    """What a node can be mutated into: expressions of one change each."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in OTHER[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.JoinedStr):
        for other in OTHER.get(type(node.op), ()):
            yield ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)][0](), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value * 2 or 1.0)


def nodes(tree, inside=""):
    """(function, node) of everything that counts: not annotations, texts or what an error says."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns") or isinstance(tree, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                where = f"{inside}.{child.name}".strip(".") if named else inside
                yield where, child
                yield from nodes(child, where)


def mutants(source):
    """{name: source of the whole module with one change}."""
    lines, found = source.encode().splitlines(keepends=True), {}
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for where, node in nodes(ast.parse(source)):
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        made = [ast.Constant(None)] if called else changes(node)
        for new in made:
            begin, end = (
                starts[row - 1] + at
                for row, at in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
            )
            line = lines[node.lineno - 1].decode().split("#")[0].strip()
            old, text = " ".join(source.encode()[begin:end].decode().split()), ast.unparse(new)
            name = f"{where or 'module'}: {line[:90]}: {old[:90]} -> {text[:90]}"
            while name in found:
                name += "'"
            found[name] = (source.encode()[:begin] + b"(" + text.encode() + b")" + source.encode()[end:]).decode()
    return found


class Ordered:
    """Runs the quickest tests first, before them those that noticed the latest mutants; keeps how long each took."""

    def __init__(self, took, latest):
        self.took, self.latest, self.now, self.noticed = took, latest, {}, None

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: (-self.latest.get(item.nodeid, -1), self.took.get(item.nodeid, 0.0)))

    def pytest_runtest_logstart(self, nodeid):
        if self.took:  # a loop that never ends is noticed as well
            signal.setitimer(signal.ITIMER_REAL, 60 + 4 * self.took.get(nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.now[report.nodeid] = self.now.get(report.nodeid, 0.0) + report.duration
        self.noticed = report.nodeid if report.failed else self.noticed


def tested(copy, module, took=(), latest=(), limit=1800.0):
    """One run of a module's tests in a fork: (outcome, seconds, what the fork had to say)."""
    began, told = time.monotonic(), copy / "told.json"
    told.unlink(missing_ok=True)
    if not (process := os.fork()):
        os.setsid()
        sys.dont_write_bytecode = bool(took)  # compiled once, but for the module that changes
        out = os.open(copy / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        order = Ordered(dict(took), dict(latest))
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        options += ["--hypothesis-seed=0", "--hypothesis-profile=mutants"]
        files = [str(copy / f"tests/test_{name}.py") for name in TESTS.get(module, (module,))]
        code = pytest.main([*options, f"--basetemp={copy / 'tmp'}", *files], [order])
        ready = [
            name
            for name, m in sys.modules.items()
            if "site-packages" in (getattr(m, "__file__", None) or "") and "._" not in name
        ]
        told.write_text(json.dumps(dict(took=order.now, noticed=order.noticed, modules=ready)))
        os._exit(int(code))
    while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() - began < limit:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process, signal.SIGKILL)
    if not ended[0]:
        ended = os.waitpid(process, 0)
    seconds = time.monotonic() - began
    said = json.loads(told.read_text()) if told.exists() else {}
    late = seconds >= limit or ended[1] == signal.SIGALRM
    return ("survived" if ended[1] == 0 else "late" if late else "killed"), seconds, said


def run(module, args, copy):
    """{outcome: names} of the mutants of a module."""
    path, source = copy / f"aevlp/{module}.py", (ROOT / f"aevlp/{module}.py").read_text()
    known = tomllib.loads(EQUIVALENT.read_text()).get(module, {})
    every = mutants(source)
    if gone := [name for name in known if name not in every]:
        raise SystemExit(f"{EQUIVALENT.name}: no mutant of {module} is called {gone[0]!r}")
    names = [name for name in every if name not in known and args.match in name]
    if args.again:
        earlier = counts().get(module, {"unnoticed": (), "mutants": None})
        if earlier["mutants"] != len(every) or not set(earlier["unnoticed"]) <= set(every):
            raise SystemExit(f"{module} has other mutants than those of {COUNTS.name}: it has to be tried whole first")
        names = [name for name in names if name in earlier["unnoticed"]]
    if args.sample and args.sample < len(names):
        names = sorted(random.Random(args.seed).sample(names, args.sample), key=list(every).index)
    outcome, seconds, said = tested(copy, module)
    if outcome != "survived":
        raise SystemExit(f"the tests of {module} fail without any change: {(copy / 'out.txt').read_text()[-2000:]}")
    for name in said["modules"]:
        with contextlib.suppress(Exception):  # a saving alone: the tests import what they need
            importlib.import_module(name)
    found, latest = {"killed": [], "late": [], "survived": [], "equivalent": list(known)}, {}
    for i, name in enumerate(names):
        path.write_text(every[name])
        outcome, _, told = tested(copy, module, said["took"], latest, 60 + 4 * seconds)
        if told.get("noticed"):
            latest[told["noticed"]] = i
        found[outcome].append(name)
        if outcome != "killed":
            print(f"{outcome}: [{module}] {name}", flush=True)
    path.write_text(source)
    said = ", ".join(f"{len(names)} {outcome}" for outcome, names in found.items())
    print(f"{module}: {len(every)} mutants, {len(names)} tried: {said}", flush=True)
    if not (args.sample or args.match):
        keep(module, every, known, found["survived"])
    return found


def counts():
    """{module: what is known of its mutants}."""
    return json.loads(COUNTS.read_text()) if COUNTS.exists() else {}


def keep(module, every, known, unnoticed):
    """Replace what is known of a module; one that never ends was noticed."""
    noticed = len(every) - len(known) - len(unnoticed)
    row = dict(mutants=len(every), noticed=noticed, equivalent=len(known), unnoticed=unnoticed)
    rows = counts() | {module: row}
    COUNTS.write_text(json.dumps({name: rows[name] for name in MODULES if name in rows}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--sample", type=int, help="so many of each module")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--match", default="", help="those whose name holds this text")
    parser.add_argument("--again", action="store_true", help="those that nothing noticed in the last run")
    args = parser.parse_args()
    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate))  # any failing example is enough
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
        for name in LINKED:
            (copy / name).symlink_to(ROOT / name)
        os.chdir(copy)
        os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        sys.path.insert(0, str(copy))
        left = [name for module in args.modules for name in run(module, args, copy)["survived"]]
    sys.exit(f"{len(left)} mutants that no test notices" if left else 0)


if __name__ == "__main__":
    main()
