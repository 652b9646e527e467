"""Every setting is listed with its default and its meaning, in `fit --help` and for a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from labeler import LabelerConfig, TeacherConfig
from labeler.base.settings import Affects, names_that_affect, settings_of
from pipeline import LoaderConfig
from train.__main__ import main
from train.recipes.config import SECTIONS, keys_that_affect
from train.recipes.listing import listing, setting_rows
from train.recipes.recipe import flat, load_recipe, recipe_names


def test_every_setting_says_what_it_means_and_what_it_affects():
    for section, group in SECTIONS.items():
        for name, field in group.model_fields.items():
            assert field.description, f"{section}.{name} has no meaning"
            assert (field.json_schema_extra or {}).get("affects") in get_args(Affects), f"{section}.{name}"
    parts = [keys_that_affect(what) for what in get_args(Affects)]
    assert sum(map(len, parts)) == len(frozenset().union(*parts)) == len(setting_rows())
    assert "optimizer.lr" in parts[0]
    assert "data.store" in parts[1]
    assert "run.micro_batch" in parts[2]
    assert "run.log_every" in parts[3]


def test_the_help_of_fit_lists_every_key_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for group in SECTIONS.values():
        for one in settings_of(group):
            assert f"\n  {one.name}" in told
    assert "\n  lr = 0.001  " in told
    assert "\n  betas = none  " in told
    assert "\n  mix = auto  " in told
    assert "(auto|none|token|image)" in " ".join(told.split())
    assert max(map(len, told.splitlines())) <= 120


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_listed_with_its_values_and_what_they_replace(capsys, name):
    assert main(["recipes", name, "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    values = json.loads(json.dumps(flat(load_recipe(name))))
    assert {key: row["value"] for key, row in rows.items()} == values
    assert rows["optimizer.lr"]["default"] == 1e-3
    assert rows["schedule.epochs"]["meaning"].startswith("length of the run")
    assert main(["recipes", name]) == 0
    told = capsys.readouterr().out
    assert f"  batch_size = {values['run.batch_size']} " in told


def test_a_value_beside_the_default_is_told():
    told = listing(load_recipe("demansia_tiny"))
    assert "\n  epochs = 310 " in told
    assert "length of the run in" in told
    assert "(default 300)" in told


def test_a_typo_and_a_missing_folder_are_refused_before_torch_is_imported():
    code = (
        "import sys; from train.__main__ import main\n"
        "for arguments in (['lrr=3'], ['optimizer.lr=x'], []):\n"
        "    assert main(['fit', 'demansia_tiny', *arguments]) == 2\n"
        "assert not {'torch', 'timm', 'h5py'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = ended.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error"] * 3
    assert "Did you mean 'lr'?" in lines[0]
    assert "data.images: 'imagenet/train' is not a folder" in lines[2]


@pytest.mark.parametrize("group", [LabelerConfig, TeacherConfig, LoaderConfig])
def test_every_option_of_labeler_and_loader_says_so_too(group):
    for one in settings_of(group):
        assert one.meaning
        assert one.affects in get_args(Affects), f"{one.name} is undecided"


def test_what_a_plan_keeps_and_what_a_state_compares_is_derived():
    """A new option that affects values is among them without anybody listing it."""
    assert names_that_affect(LabelerConfig, "values") == {"bytes_per_image", "orientation", "min_side", "max_pixels"}
    compared = names_that_affect(LoaderConfig, "values", "rounding")
    assert {"seed", "scale", "mix", "batch_size", "world_size", "backend"} <= compared
    assert not compared & {"images", "store", "rank", "threads", "cache", "prefetch", "progress"}
