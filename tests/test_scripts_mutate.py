"""Small changes of the code: what is changed, and that the table of those that alter nothing is not stale."""

from __future__ import annotations

import ast
import tomllib

import pytest

from scripts.mutate import ROOT, TABLE, main, mutated, mutations

SOURCE = '''
def share(a: "int" = 1, b: float = 0.5) -> "float":
    """The share."""
    if a < 2 and not b:
        raise ValueError(f"{a + 1}", 7)
    return -a + b * 3 if True else sum(zip([a], [b], strict=True))
'''


def test_every_change_is_one_small_change():
    found = mutations("share.py", SOURCE)
    assert [m.name.split(": ", 1)[1].split(" in ")[0] for m in found] == [
        "1 -> 2", "0.5 -> 1.0", "a < 2 and (not b) -> not (a < 2 and (not b))", "a < 2 and (not b) -> a < 2 or not b",
        "a < 2 -> a <= 2", "2 -> 3", "not b -> not not b", "True -> not True", "True -> False",
        "-a + b * 3 -> -a - b * 3", "-a -> +a", "b * 3 -> b / 3", "3 -> 4",
    ]  # fmt: skip
    whole = ast.unparse(ast.parse(SOURCE)) + "\n"
    changed = [mutated(SOURCE, m.number) for m in found]
    assert whole not in changed
    assert len(set(changed)) == len(found)
    assert all("The share." in text and "strict=True" in text and "7" in text for text in changed)
    assert {m.line for m in found} == {2, 4, 6}


def test_the_table_names_what_there_is():
    table = tomllib.loads(TABLE.read_text())
    for file, tests in table["tests"].items():
        assert tests
        for name in tests:
            assert (ROOT / "tests" / f"test_{name}.py").exists(), name
        assert (ROOT / file).exists(), file
    assert all(entry["change"].split(": ")[0] in table["tests"] for entry in table["equivalent"])


def test_files_without_tests_are_refused():
    with pytest.raises(SystemExit, match=r"got nothing\.py, expected files of mutate\.toml"):
        main(["--files", "nothing.py"])
