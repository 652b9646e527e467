"""One program for every command, also beside files of the user's that have our packages' names."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import labeler.__main__
from labeler import InputError, label_images
from labeler.base.command_line import with_flags
from train import commands
from train.commands import COMMANDS, main

# These are what flags belong to: options, their help, the listing of commands, and the launcher of `fit --ranks`.
COMMAND_LINES = {"__main__.py", "arguments.py", "commands.py", "command_line.py", "settings.py", "launch.py"}
NAMES = [name for group in COMMANDS.values() for name, (package, _, _) in group.items() if package]


def called(
    *arguments: str, folder: Path, module: str = "train.commands", safe: bool = True
) -> subprocess.CompletedProcess:
    """The program, as its console script runs it: the working folder is not where packages are looked for first."""
    root = str(Path(commands.__file__).parents[1])
    command = [sys.executable, *(["-P"] if safe else []), "-m", module, *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True, check=False
    )


def test_the_help_names_every_command_with_examples(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in NAMES:
        assert f"\n  {name} " in told
    assert "examples:" in told
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("token-labeling 0.")


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_its_help_under_the_program_s_name(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: token-labeling ")


def test_a_misspelt_command_is_told_the_nearest(capsys):
    assert main(["lable"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'lable'. Did you mean 'label'?\n"


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with files of the user's that would hide all our packages; they must not be run."""
    for name in ("labeler", "pipeline", "model", "train"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the user was run')")
    return tmp_path


def test_it_works_beside_a_users_files_of_the_same_names(crowded):
    for arguments in (["doctor", "--json"], ["models"], ["recipes"], ["view", "--help"]):
        ended = called(*arguments, folder=crowded)
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        assert ended.stdout


def test_a_users_model_py_is_named_where_it_hides_ours(tmp_path):
    (tmp_path / "model.py").write_text("raise SystemExit('the file of the user was run')")
    ended = called("recipes", folder=tmp_path, module="train", safe=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: {tmp_path / 'model.py'} hides the package 'model' of token-labeling. Use `token-labeling COMMAND`, "
        "which does not look in this folder first.\n"
    )


def test_a_users_labeler_py_is_named_too(tmp_path):
    (tmp_path / "labeler.py").write_text("")
    ended = called("recipes", folder=tmp_path, module="train", safe=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path / 'labeler.py'} hides a package of ours. ")
    assert ended.stderr.count("\n") == 1


def test_a_teacher_may_be_a_function_of_the_working_folder(tmp_path):
    (tmp_path / "my_teacher.py").write_text("")
    ended = called("label", "nowhere", "--store", "s", "--teacher", "my_teacher:absent", folder=tmp_path)
    assert ended.returncode == 2
    assert "'nowhere'" in ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_options(shell, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", shell]) == 0
    told = capsys.readouterr().out
    for text in ("import-token-labels", "--bytes-per-image", "--resume"):
        assert text in told
    assert main(["completion", "cmd"]) == 2


def test_settings_in_an_error_are_names_in_python_and_flags_on_the_command_line(images, tmp_path, config, capsys):
    with pytest.raises(InputError, match="Omit `extend`: that begins a store"):
        label_images(images, tmp_path / "none", dataclasses.replace(config, extend=True))
    command = ["label", str(images), "--store", str(tmp_path / "none"), "--teacher", "tiny:colour_teacher", "--extend"]
    assert labeler.__main__.main(command) == 2
    assert "Omit --extend: that begins a store" in capsys.readouterr().err


def test_flags_have_values_and_other_names_stay():
    parser = labeler.__main__.parser_of("label")
    text = "use `decoder=cpu`, `input_size`, `ema`, `ray status`, `run.out` or `images`"
    assert with_flags(text, parser) == "use --decoder cpu, --input-size, --ema, `ray status`, `run.out` or `images`"


def plain_strings(tree: ast.Module) -> Iterator[str]:
    """All but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "_" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
            yield node.value


LIBRARIES = [
    path
    for package in ("labeler", "pipeline", "model", "train")
    for path in sorted((Path(labeler.__file__).parents[1] / package).rglob("*.py"))
    if path.name not in COMMAND_LINES
]


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_message_of_a_library_speaks_of_flags(path):
    """But for commands between backticks, such as `label --extend`."""
    texts = (re.sub("`[^`]*`", "", text) for text in plain_strings(ast.parse(path.read_text())))
    assert not [text for text in texts if re.search(r"--[a-z]", text)]
