"""Mutation testing: makes small changes to the code and counts which the tests notice.

    python -m scripts.mutate --count 40

A change is one operator, comparison, constant or condition of a core file (`mutate.toml` names them and their tests).
The work is done on a copy of the working tree; nothing of the tree itself is touched. A change that passes its file's
tests is a survivor: either a test is missing, or the change alters nothing that can be told. `mutate.toml` lists the
latter, each with its reason; they do not count.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "scripts" / "mutate.toml"
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# Not changed: what annotates, decorates or explains, and arguments that no CPU's answer depends on.
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list"}
SKIPPED_ARGUMENTS = {"strict", "non_blocking", "remedy", "got", "expected"}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """The `number`-th change of a file; `name` contains the function, the old code and the new code."""

    file: str
    number: int
    line: int
    name: str

    @property
    def key(self) -> str:
        return f"{self.file}: {self.name}"


def places(node: ast.AST, scope: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with the function it is in."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        scope = f"{scope}.{node.name}".lstrip(".")
    if isinstance(node, (ast.JoinedStr, ast.Raise)) or (
        isinstance(node, ast.keyword) and node.arg in SKIPPED_ARGUMENTS
    ):
        return
    yield node, scope
    for field, value in ast.iter_fields(node):
        if field not in SKIPPED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from places(child, scope)


def change(node: ast.AST) -> bool:
    """Change a node in place. Returns False if there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        node.value = node.value * 2 or 1.0
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        if isinstance(node.test, ast.UnaryOp) or (isinstance(node.test, ast.Compare) and not ordering(node.test)):
            return False  # the test is changed by itself, to the same effect
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    else:
        return False
    return True


def ordering(node: ast.Compare) -> bool:
    return isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))


def shown(node: ast.AST) -> str:
    part = node.test if isinstance(node, (ast.If, ast.IfExp, ast.While)) else node
    return ast.unparse(part).split("\n")[0][:90]


def mutations(file: str, source: str) -> list[Mutation]:
    """All changes of a file. Their names hold no line numbers, so that they outlive changes elsewhere in the file."""
    found, lines, seen = [], source.splitlines(), Counter[str]()
    for number, (node, scope) in enumerate(places(ast.parse(source))):
        changed = copy.deepcopy(node)
        if change(changed):
            line = getattr(node, "lineno", 0)
            name = f"{scope or 'module'}: {shown(node)} -> {shown(changed)}"
            if isinstance(node, ast.Constant):
                name += f" in {lines[line - 1].strip()[:80]}"
            seen[name] += 1
            found.append(Mutation(file, number, line, name + f" #{seen[name]}" * (seen[name] > 1)))
    return found


def mutated(source: str, number: int) -> str:
    tree = ast.parse(source)
    change(next(node for i, (node, _) in enumerate(places(tree)) if i == number))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def copy_tree(target: Path) -> None:
    """Copy the files that git tracks, and untracked files that it does not ignore, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def tests_pass(tree: Path, tests: list[str], timeout: float) -> str:
    """ "passed", "failed" or "timeout"."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--no-header"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/test_{name}.py" for name in tests)]
    # No compiled files: a change within a second and of the same size would not be seen.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(tree / "pytest.log", "w") as log:
        child = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return "passed" if child.wait(timeout) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def run(
    chosen: list[Mutation], tests: dict[str, list[str]], timeout: float, unchecked: bool
) -> Iterator[tuple[Mutation, str]]:
    """Each change with "caught", "survived" or "timeout"; a timeout counts as caught, as the tests would hang."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder) / "main"
        copy_tree(tree)
        used = sorted({mutation.file for mutation in chosen})
        needed = list(dict.fromkeys(name for file in used for name in tests[file]))
        if needed and not unchecked and tests_pass(tree, needed, 10 * timeout) != "passed":
            raise SystemExit(f"the tests fail before anything is changed:\n{(tree / 'pytest.log').read_text()[-2000:]}")
        for mutation in chosen:
            source = (tree / mutation.file).read_text()
            (tree / mutation.file).write_text(mutated(source, mutation.number))
            outcome = tests_pass(tree, tests[mutation.file], timeout)
            (tree / mutation.file).write_text(source)
            yield mutation, {"passed": "survived", "failed": "caught"}.get(outcome, outcome)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mutate", description="How many small changes do tests notice?"
    )
    parser.add_argument("--files", nargs="*", help="files of scripts/mutate.toml to change (default: all)")
    parser.add_argument("--count", type=int, default=40, help="number of changes, drawn from all files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the draw (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="time limit for the tests of a change (%(default)s)"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not check first that the tests pass without changes"
    )
    parser.add_argument("--only", metavar="TEXT", help="only changes whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    table = tomllib.loads(TABLE.read_text())
    tests, reasons = table["tests"], {entry["change"]: entry["reason"] for entry in table.get("equivalent", [])}
    files = options.files or sorted(tests)
    if unknown := [file for file in files if file not in tests]:
        raise SystemExit(f"no tests are known: got {', '.join(unknown)}, expected files of {TABLE.name}")
    everything = [mutation for file in files for mutation in mutations(file, (ROOT / file).read_text())]
    names = {mutation.key for mutation in everything}
    for change in reasons:
        if change.split(": ")[0] in files and change not in names:
            print(f"{TABLE.name} lists a change that no longer exists, as its line has changed: {change}")
    matches = [mutation for mutation in everything if options.only is None or options.only in mutation.key]
    chosen = random.Random(options.seed).sample(matches, min(options.count, len(matches)))
    print(f"{len(chosen)} of {len(matches)} changes in {len(files)} files", flush=True)
    if options.list:
        print("\n".join(mutation.key for mutation in sorted(chosen, key=lambda m: (m.file, m.number))))
        return 0
    done, start = [], time.monotonic()
    known = [mutation for mutation in chosen if mutation.key in reasons]
    counting = [mutation for mutation in chosen if mutation.key not in reasons]
    for mutation, outcome in run(counting, tests, options.timeout, options.unchecked):
        print(
            f"{time.monotonic() - start:6.0f} s  {outcome:8}  {mutation.file}:{mutation.line}  {mutation.name}",
            flush=True,
        )
        done.append(dataclasses.asdict(mutation) | {"outcome": outcome})
    done += [
        dataclasses.asdict(mutation) | {"outcome": "equivalent", "reason": reasons[mutation.key]} for mutation in known
    ]
    counts = Counter(entry["outcome"] for entry in done)
    caught, counted = counts["caught"] + counts["timeout"], len(done) - counts["equivalent"]
    print(
        f"{len(done)} changes: {dict(counts)}; caught {caught} of {counted}"
        + f" ({caught / counted:.0%})" * (counted > 0)
    )
    if options.json:
        options.json.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    return int(counts["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())
