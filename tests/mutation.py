"""How many small faults do the tests see?

`python tests/mutation.py kernels/masks` changes one operator, number or statement of
`keras_renorm/src/kernels/masks.py` at a time, runs `tests/kernels/test_masks.py`, and lists the changes that no test saw.
Not run by pytest.
"""

import argparse
import ast
import importlib
import inspect
import os
import random
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Threads do not survive a fork.
os.environ |= {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

import keras
import pytest

ROOT = Path(__file__).parents[1]
OPERATORS = {
    **{ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt]},
    **{ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn]},
    **{ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd]},
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult]},
    **{ast.Mod: [ast.Mult], ast.Pow: [ast.Mult], ast.BitXor: [ast.BitOr], ast.MatMult: [ast.Mult]},
}
PAIRS = [("minimum", "maximum"), ("min", "max"), ("any", "all"), ("floor", "ceil"), ("argmin", "argmax"), ("zeros", "ones")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
REMOVABLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.If, ast.For, ast.Continue, ast.Break)


def mutations(node):
    """Functions that change a node in place, each with its description."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in OPERATORS[type(operator)]:
                yield lambda n, i=index, o=other: n.ops.__setitem__(i, o())
    elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)):
        for other in OPERATORS.get(type(node.op), []):
            yield lambda n, o=other: setattr(n, "op", o())
    elif isinstance(node, ast.UnaryOp):
        yield lambda n: setattr(n, "operand", ast.UnaryOp(n.op, n.operand))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield lambda n: setattr(n, "value", not n.value)
        elif isinstance(node.value, (int, float)):
            for step in (1, -1):
                yield lambda n, s=step: setattr(n, "value", n.value + s)
        elif node.value is None:
            yield lambda n: setattr(n, "value", 1)
        elif isinstance(node.value, str):
            yield lambda n: setattr(n, "value", n.value + "x")
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    elif isinstance(node, ast.comprehension):
        for index in range(len(node.ifs)):
            yield lambda n, i=index: n.ifs.pop(i)
    elif isinstance(node, ast.Call):
        for index in range(len(node.keywords)):
            yield lambda n, i=index: n.keywords.pop(i)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield lambda n: setattr(n, "attr", NAMES[n.attr])
    for field in ("body", "orelse"):
        for index, statement in enumerate(getattr(node, field, None) if isinstance(getattr(node, field, None), list) else []):
            if isinstance(statement, REMOVABLE) and not isinstance(getattr(statement, "value", None), ast.Constant):
                yield lambda n, f=field, i=index: getattr(n, f).__setitem__(i, ast.copy_location(ast.Pass(), getattr(n, f)[i]))


def nodes(tree):
    """All nodes in a fixed order, but for annotations and messages of errors."""
    yield tree
    for name, field in ast.iter_fields(tree):
        if name in ("annotation", "returns") or isinstance(tree, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                yield from nodes(child)


def mutant(source, place, number):
    """The tree with one node changed, and how its line reads before and after; `None` if nothing changes."""
    tree = ast.parse(source)
    node = list(nodes(tree))[place]
    before = ast.unparse(tree).split("\n")
    list(mutations(node))[number](node)
    after = ast.unparse(ast.fix_missing_locations(tree)).split("\n")
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after) if old != new]
    return tree, (f"line {getattr(node, 'lineno', 0)}: {changed[0][0]}  ->  {changed[0][1]}" if changed else None)


def install(module, tree):
    """Put the code of a changed module into the one that is imported, whoever holds its functions and classes."""
    changed = {"__name__": module.__name__, "__package__": module.__package__, "__file__": module.__file__}
    registered = dict(keras.saving.get_custom_objects())
    exec(compile(tree, module.__file__, "exec"), changed)
    keras.saving.get_custom_objects().update(registered)
    own = {id(value): name for name, value in changed.items() if getattr(value, "__module__", "") == module.__name__}

    def known(value):
        if isinstance(value, dict):
            return {known(key): known(one) for key, one in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(known, value))
        return getattr(module, own[id(value)], value) if id(value) in own else value

    def replace(owner, name, new):
        old = owner.__dict__.get(name)
        if inspect.isclass(new) and id(new) in own:
            for key, value in list(vars(new).items()):
                if key not in ("__dict__", "__weakref__", "__module__", "__doc__"):
                    replace(old, key, value)
        elif inspect.isfunction(new) and inspect.isfunction(old):
            old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        elif isinstance(new, property) and new.fget and isinstance(old, property):
            old.fget.__code__ = new.fget.__code__
        else:
            setattr(owner, name, known(new))

    for name, value in changed.items():
        if not name.startswith("__") and (id(value) in own or not inspect.isclass(value)):
            replace(module, name, value)


class Mutation:
    """Plugin of pytest: runs the collected tests once for each fault, in processes of their own, until one fails."""

    def __init__(self, path, faults, seconds):
        self.path, self.faults, self.seconds, self.survivors = path, faults, seconds, []
        self.module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def passes(self, session, tree=None):
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            if tree is not None:
                install(self.module, tree)
            for item, following in zip(session.items, [*session.items[1:], None]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
        except BaseException:
            os._exit(1)
        os._exit(bool(session.testsfailed))

    def pytest_runtestloop(self, session):
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        session.config.pluginmanager.unregister(terminal)
        source = self.path.read_text()
        if not self.passes(session) or not self.passes(session, ast.parse(source)):
            pytest.exit("The tests fail without any fault.", returncode=1)
        for fault in self.faults:
            tree, description = mutant(source, *fault)
            if description and self.passes(session, tree):
                self.survivors.append(description)
                print(description, flush=True)
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="such as kernels/masks or layers/prunable")
    parser.add_argument("--most", type=int, default=150, help="how many faults, drawn at random")
    parser.add_argument("--lines", default="1-99999", help="first-last: only faults in these lines")
    parser.add_argument("--seconds", type=int, default=30, help="of the processor: a fault that takes longer counts as seen")
    # The rest is for pytest; the mirrored file by default.
    arguments, tests = parser.parse_known_args()
    path = ROOT / "keras_renorm" / "src" / f"{arguments.module}.py"
    folder, _, name = arguments.module.rpartition("/")
    first, last = map(int, arguments.lines.split("-"))
    faults = [
        (place, number)
        for place, node in enumerate(nodes(ast.parse(path.read_text())))
        if first <= getattr(node, "lineno", 0) <= last
        for number in range(len(list(mutations(node))))
    ]
    faults = sorted(random.Random(0).sample(faults, min(arguments.most, len(faults))))
    plugin = Mutation(path, faults, arguments.seconds)
    keras.utils.set_random_seed(0)  # imports what each process would import
    if keras.backend.backend() == "tensorflow":
        # Compiled functions run in threads of their own.
        importlib.import_module("tensorflow").config.run_functions_eagerly(True)
    mirrored = str(ROOT / "tests" / folder / f"test_{name}.py")
    if pytest.main(["-q", "-p", "no:cacheprovider", *(tests or [mirrored])], plugins=[plugin]):
        sys.exit("The tests fail without any fault, or there are none.")
    print(f"{arguments.module}: of {len(faults)} faults {len(plugin.survivors)} are seen by no test")


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    main()
