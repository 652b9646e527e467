"""README and docs/ do what they say: Python is run, command lines are parsed, links lead somewhere, no name is missing.

A block that cannot be run has `<!-- not run: the reason -->` in the line above it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY
from tiny import CLASSES, SIDE, make_images

from labeler import InputError, LabelerConfig, label_images
from labeler.base.command_line import OURS
from scripts.documentation.commands import PLACES, parser_of
from scripts.documentation.hooks import LINK
from scripts.documentation.hooks import _link as site_link
from train import fit
from train.recipes.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OUTSIDE = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "labeler/FORMAT.md", "scripts/cluster/README.md")
PAGES = [*DOCS, *map(ROOT.joinpath, OUTSIDE), ROOT / "tests/fixtures/README.md"]
BLOCK = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run:(.*)-->\Z")
# What a try-out changes: a small network without pretrained weights, small pictures, few of them.
CHANGES = {
    '"resnet50", num_classes=1000': f'"resnet10t", num_classes={CLASSES}, img_size=64',
    "image_size=224": f"image_size={SIDE}",
    "batch_size=128": "batch_size=4",
    "grid=(14, 14)": "grid=(4, 4)",
    'store="labels", mix="token"': 'store="labels", mix="token", batch_size=4, image_size=32, grid=(2, 2)',
    '"demansia_tiny", drop': f'"demansia_tiny", num_classes={CLASSES}, img_size={SIDE}, depth=2, drop',
    "grid=net.grid": "grid=net.grid, batch_size=4",
    '"data.validation=VAL"': '"data.validation=VAL", "model.img_size=32", "model.args={embed_dim=32, depth=2}", '
    '"schedule.steps=1", "run.batch_size=4", "run.tensorboard=false", "run.device=cpu"',
    'TeacherConfig("resnet50.a1_in1k"), workers=2': 'TeacherConfig("tiny:colour_teacher"), decoder="pil"',
}
# What a page finds in its folder, and what it makes there itself.
LINKS = {"IMAGES": "IMAGES", "images": "IMAGES", "VAL": "IMAGES", "labels": "labels", "runs": "runs"}
MADE_BY_ITSELF = {("labeling.md", "labels"), ("training.md", "runs")}
WRONG = (AssertionError, SystemExit, InputError)
NO_GRIFFE = "griffe, which reads docstrings for the site, is not installed (make docs)"
# Programs that are not ours: their arguments are theirs.
OTHERS = {"export", "perf", "py-spy", "ray"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    not_run: str | None  # the reason


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in BLOCK.finditer(text):
        above = text[: found.start()].rstrip("\n").rpartition("\n")[2].strip()
        reason = NOT_RUN.search(above)
        code = re.sub(f"^{found[1]}", "", found[3], flags=re.M)
        yield Block(found[2], code, text[: found.start()].count("\n") + 2, reason[1].strip() if reason else None)


def code_pages(language: str) -> list[Path]:
    return [page for page in (*DOCS, ROOT / "labeler/FORMAT.md") if any(b.language == language for b in blocks(page))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, their labels and a run under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    make_images(folder / "IMAGES", 12, CLASSES)
    (folder / "IMAGES/class0").rename(folder / "IMAGES/n01491361")
    shark = sorted((folder / "IMAGES/n01491361").iterdir())[0]
    shark.rename(shark.with_name("n01491361_tiger_shark.JPEG"))
    settings = {"shard_size": 6, "batch_size": 4, "decoder": "pil", "threads": 1, "progress": False}
    label_images(folder / "IMAGES", folder / "labels", LabelerConfig(TINY, **settings))
    data = [f"data.images={folder}/IMAGES", f"data.store={folder}/labels", f"data.validation={folder}/IMAGES"]
    run = [f"run.out={folder}/runs/resnet50", "run.batch_size=4", "run.tensorboard=false", "run.device=cpu"]
    small = ["model.name=resnet10t", "augment.mix=auto", "model.img_size=64", "schedule.steps=1"]
    fit(load_recipe("demansia_tiny", [*data, *run, *small]))
    return folder


@pytest.mark.parametrize("page", code_pages("python"), ids=name)
def test_the_python_of_a_page_runs(page, data, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for link, target in {
        "IMAGES": "IMAGES",
        "images": "IMAGES",
        "VAL": "IMAGES",
        "labels": "labels",
        "runs": "runs",
    }.items():
        if (page.name, link) not in MADE_BY_ITSELF:
            (here / link).symlink_to(data / target)
    monkeypatch.chdir(here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            code = block.code
            for old, new in CHANGES.items():
                code = code.replace(old, new)
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


def test_what_is_not_run_says_why():
    for page in PAGES:
        for block in blocks(page):
            assert block.not_run is None or len(block.not_run) > 10, f"{name(page)}:{block.line}"
        noted = re.findall(r"^ *<!-- not run", page.read_text(), re.M)
        assert len(noted) == sum(b.not_run is not None for b in blocks(page)), name(page)


def test_what_a_try_out_changes_is_there():
    texts = [page.read_text() for page in DOCS]
    assert not [old for old in CHANGES if not any(old in text for text in texts)]


def command_lines(page: Path) -> list[str]:
    found = []
    for block in blocks(page):
        if block.language == "bash" and block.not_run is None:
            found += block.code.replace("\\\n", " ").splitlines()
    return [line for line in found if shlex.split(line, comments=True)]


@pytest.mark.parametrize("page", code_pages("bash"), ids=name)
def test_the_command_lines_of_a_page_parse(page):
    for line in command_lines(page):
        try:
            check_command(line)
        except WRONG as error:
            pytest.fail(f"{name(page)}: {line}\n{error!r}")


@pytest.mark.parametrize(
    "line",
    [
        "token-labeling label IMAGES --store labels --teacher NAME --bacth-size 3",
        "token-labeling lable IMAGES --store labels --teacher NAME",
        "token-labeling label IMAGES --teacher NAME",
        "python -m labeler label … --ray-adress auto",
        "python -m labeler --store labels",
        "python -m train fit demansia_tiny optimizer.rate=3",
        "python -m train fit demansia_little data.images=IMAGES",
        "python -m scripts.demo.scenes out --trian 3",
        "python -m scripts.scenery out",
        "torchrun --nproc-per-node 8 … -m train fit demansia_tiny … --resmue auto",
        "pip install '.[real-techer]'",
        "make demos",
        "pytest tests/test_nothing.py",
        "frobnicate labels",
    ],
)
def test_a_wrong_command_line_is_noticed(line, capsys):
    with pytest.raises(WRONG):
        check_command(line)


def check_command(line: str) -> None:
    """Fails where the line asks for a program, command, option, setting, file or target that does not exist."""
    for part in re.split(r"\s&&\s|\s\|\s", line):
        words = shlex.split(part, comments=True)
        program, *arguments = words
        if program == "ray" and "--" in words:  # `ray job submit … -- our command`
            arguments = words[words.index("--") + 1 :]
            program, arguments = arguments[0], arguments[1:]
        if program in ("python", "torchrun"):
            module = arguments.index("-m")
            check_module(arguments[module + 1], arguments[module + 2 :])
        elif program == "token-labeling":
            assert arguments[0] in PLACES, f"no command {arguments[0]!r}"
            package, own = PLACES[arguments[0]]
            check_module(package, [own, *arguments[1:]])
        elif program == "make":
            target = next(word for word in arguments if "=" not in word)
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target!r}"
        elif program == "pip":
            check_extras(arguments[-1])
        elif program in ("pytest", "sbatch"):
            assert (ROOT / arguments[0]).exists(), f"no {arguments[0]}"
        else:
            assert program in OTHERS, f"not known: {program!r}"


def check_extras(requirement: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.search(r"\[(.*)\]", requirement)
    assert set(wanted[1].split(",") if wanted else []) <= extras.keys(), f"no extra {requirement!r}"


def check_module(module: str, arguments: list[str]) -> None:
    parser = parser_of(module) if module in OURS else script_parser(module)
    if "…" in arguments:  # something was left out, which may be anything that is needed
        arguments = [word for word in arguments if word != "…"]
        need_nothing(parser)
    options = parser.parse_args(arguments)
    if getattr(options, "overrides", None) is not None:
        assert options.recipe in recipe_names() or options.recipe.endswith(".toml"), f"no recipe {options.recipe!r}"
        load_recipe(options.recipe if options.recipe in recipe_names() else "demansia_tiny", options.overrides)


def need_nothing(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                need_nothing(command)
        else:
            action.required = False


def script_parser(module: str) -> argparse.ArgumentParser:
    """The parser that a script makes in its main()."""

    class Made(Exception):
        parser: argparse.ArgumentParser

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        made = Made()
        made.parser = parser
        raise made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module])
        try:
            script = importlib.import_module(module)
            if hasattr(script, "__path__"):
                script = importlib.import_module(f"{module}.__main__")
        except ImportError as error:
            raise AssertionError(f"no module {module!r}") from error
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Made) as made:
            script.main()
    return made.value.parser


def anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    text = re.sub(BLOCK, "", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", re.sub(BLOCK, "", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<!-- include: (\S+) -->", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} in {name(page)}"
        assert file.is_relative_to(ROOT), f"{target} in {name(page)} leaves the repository"
        assert not anchor or anchor in anchors(file), f"{target} in {name(page)}: no such heading"


@pytest.mark.parametrize("package", OURS)
def test_the_reference_has_every_public_name_where_it_lives(package):
    module = importlib.import_module(package)
    names = [public for public in module.__all__ if public != "__version__"]
    homes = [f"{getattr(getattr(module, public), '__module__', package)}.{public}" for public in names]
    listed = re.findall(r"^::: (\S+)$", (ROOT / f"docs/reference/{package}.md").read_text(), re.M)
    assert sorted(listed) == sorted(homes)


def test_every_page_is_on_the_site_and_every_command_on_its_page():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS[1:]:
        assert f": {os.path.relpath(page, ROOT / 'docs')}\n" in site, f"{name(page)} is not in mkdocs.yml"
    told = (ROOT / "docs/command-line.md").read_text()
    assert not [command for command in PLACES if f"`{command}`" not in told]


def test_links_are_followed_on_the_site():
    def shown(text: str, base: str, here: str = "docs") -> str:
        return LINK.sub(lambda link: site_link(link, Path(base), Path(here)), text)

    assert shown("[a](../labeler/FORMAT.md#files)", "docs") == "[a](format.md#files)"
    assert shown("[a](docs/cluster.md)", ".") == "[a](cluster.md)"
    assert shown("[a](../loading.md)", "docs/reference", "docs/reference") == "[a](../loading.md)"
    assert shown("[slurm.sh](../scripts/cluster/slurm.sh), [tests](../tests/tiny.py)", "docs") == "`slurm.sh`, `tests`"
    assert (
        shown("[two words](../tests/tiny.py) ![a](a.png) [b](https://b)", "docs")
        == "two words ![a](a.png) [b](https://b)"
    )


def test_aligned_entries_of_a_docstring_become_a_list():
    pytest.importorskip("griffe", reason=NO_GRIFFE)
    from scripts.documentation.docstrings import as_lists

    text = "A store.\n\npath    its folder,\n        a path\ncache, x  none\nRaises InputError."
    wanted = "A store.\n\n\n* **path**: its folder,\n  a path\n* **cache, x**: none\n\nRaises InputError."
    assert as_lists(text) == wanted


def test_the_reference_tells_settings_with_their_meanings_and_defaults():
    griffe = pytest.importorskip("griffe", reason=NO_GRIFFE)
    from scripts.documentation.docstrings import MeaningLists

    module = griffe.load("pipeline.config", search_paths=[ROOT], extensions=griffe.load_extensions(MeaningLists))
    settings = module["LoaderConfig"]
    assert "\n* **batch_size**: images per batch and rank\n" in settings.docstring.value
    assert str(settings.parameters["batch_size"].default) == "128"
    assert settings.parameters["images"].default is None


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
