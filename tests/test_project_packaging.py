"""The package as it is installed: what is in the wheel, and what works, or says what is missing, without the extras."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from labeler.base.command_line import IN_EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("labeler", "pipeline", "model", "train")
# Hides packages as if they were not installed, then runs what follows.
HIDE = """
import sys
hidden = set(sys.argv.pop(1).split(","))
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""
COMMAND = HIDE + "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def run_without(hidden: set[str], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -c code arguments` where the `hidden` packages cannot be imported."""
    given = [sys.executable, "-c", code, ",".join(hidden), *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, check=False, timeout=120)


def names(extra: str) -> set[str]:
    """What an extra installs, by name."""
    return {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in PROJECT["optional-dependencies"][extra]}


def test_the_extras_are_what_the_package_alone_has_not():
    heavy = names("label") | names("train")
    assert {name for name in heavy if not name.startswith("nvidia-dali")} == IN_EXTRAS
    assert not heavy & {re.split("[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]}


def test_a_store_is_read_without_torch(store):
    code = "import labeler, sys; print(labeler.LabelStore(sys.argv[1]).read([0, 7]).dense().shape)"
    done = run_without({*IN_EXTRAS, "nvidia", "triton"}, HIDE + code, store)
    assert (done.stdout, done.stderr) == ("(2, 6, 4, 4)\n", "")


def test_a_store_is_verified_and_reported_without_torch(store, images, tmp_path):
    page = tmp_path / "report.html"
    for command in (["verify", store, "--images", images], ["report", store, "--images", images, "--out", page]):
        done = run_without({*IN_EXTRAS, "nvidia", "triton"}, COMMAND, "labeler", *command, "--quiet")
        assert done.returncode == 0, done.stderr
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("command", "hidden", "extra"),
    [
        ("labeler label IMAGES --store NEW --teacher resnet18 --random-weights", "torch", "label"),
        ("labeler label IMAGES --store NEW --teacher resnet18 --random-weights --workers 2", "ray", "label"),
        ("labeler import-token-labels IMAGES --images IMAGES --store NEW", "torch", "label"),
        ("pipeline view IMAGES --store STORE --out NEW", "torch", "train"),
        ("train fit demo data.images=IMAGES data.store=STORE data.validation=IMAGES run.out=NEW", "torch", "train"),
        ("train validate CHECKPOINT --images IMAGES", "torch", "train"),
        ("train predict CHECKPOINT IMAGES", "torch", "train"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(command, hidden, extra, store, images, tmp_path):
    places = {"IMAGES": images, "STORE": store, "NEW": tmp_path / "new"}
    words = [re.sub("[A-Z]{3,}", lambda found: str(places.get(found[0], found[0])), word) for word in command.split()]
    done = run_without({hidden}, COMMAND, *words)
    assert done.returncode == 2, done.stderr
    text = f"error: {hidden} is required but not installed. pip install 'token-labeling[{extra}]'\n"
    assert done.stderr == text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("hidden", ["torch", "timm"])
def test_models_name_the_extra_that_they_need(hidden):
    done = run_without({hidden}, HIDE + "import model")
    said = f"models need {hidden}, which is not installed. pip install 'token-labeling[train]'"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}"


def test_a_fault_of_the_program_is_no_missing_extra():
    """A module of ours that is missing, or one inside of torch, is told with its stack trace."""
    code = (
        "from labeler.base.command_line import run_command; import argparse, importlib;"
        "run_command(argparse.Namespace(run=lambda options: importlib.import_module('torch.nothing')))"
    )
    done = run_without(set(), HIDE + code)
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


def test_the_wheel_holds_every_file_of_the_packages():
    """Recipes, the report's style and `py.typed` included; nothing else."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling, of the extra dev, is not installed")
    held = {str(file.distribution_path) for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    ours = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == ours
    data = {"labeler/report/report.css", "train/recipes/packaged/demo.toml"}
    assert data | {f"{name}/py.typed" for name in PACKAGES} <= held


def test_the_workflow_runs_what_ci_runs():
    """On every Python that the package names."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    commands = re.findall("^make .*", (ROOT / ".ci" / "run").read_text(), re.M)
    assert commands
    assert [command for command in commands if f"- run: {command}\n" not in workflow] == []
    named = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert f"python: {named}".replace("'", '"') in workflow


def test_the_citation_names_this_version():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
