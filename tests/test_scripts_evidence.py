"""The runner of the evidence: what it plans, how it counts, what it writes; every row builds and is of one size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from labeler.base.errors import InputError
from scripts import model_costs
from scripts.evidence import plots
from scripts.evidence.__main__ import main, with_result
from scripts.evidence.ablations import TABLES
from scripts.evidence.data import EPOCH, STEPS, Pictures, teacher_settings
from scripts.evidence.render import END, fill, markdown
from scripts.evidence.runs import Run, parameters, plan, stores_of
from scripts.evidence.statistics import compare_all, gaps_of_halves, mean_and_error, pooled_deviation
from scripts.evidence.tables import FAMILIES, IMAGE_LABEL, TOKEN_LABELS
from train.optimization import LearningRate
from train.recipes.recipe import load_recipe

ARMS = (IMAGE_LABEL.name, TOKEN_LABELS.name)


LABELS = {"teacher": 0.84, "agreement": 0.9, "bytes": 150.0}


def pictures(folder: Path) -> Pictures:
    return Pictures("cifar10", folder, folder, folder, folder)


def result(row: str, arm: str, seed: int, top1: float) -> dict:
    return {"row": row, "arm": arm, "seed": seed, "top1": top1, "parameters": 400_000, "cpu_seconds": 1800.0}


def results() -> list[dict]:
    """Two rows, two seeds: gains of 4 and 6 points, and of 1 and −1; a third seed of which one arm is missing."""
    values = {"demansia": [(0.40, 0.44), (0.42, 0.48)], "vim": [(0.30, 0.31), (0.32, 0.31)]}
    found = [
        result(row, arm, seed, top1)
        for row, pairs in values.items()
        for seed, pair in enumerate(pairs)
        for arm, top1 in zip(ARMS, pair, strict=True)
    ]
    return [*found, result("vim", ARMS[0], 2, 0.9)]


def test_differences_are_paired_and_their_spread_is_pooled():
    rows = compare_all(FAMILIES, results())
    assert [row.row for row in rows] == ["demansia", "vim"]
    assert rows[0].gains == pytest.approx([0.04, 0.06])
    assert rows[1].gains == pytest.approx([0.01, -0.01])
    # Squares about each row's own mean, one degree of freedom a row: 2·0.01² and 2·0.01² over 2.
    assert pooled_deviation(rows) == pytest.approx(math.sqrt(4 * 0.01**2 / 2))
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert math.isnan(mean_and_error([1.0])[1])
    assert math.isnan(pooled_deviation(compare_all(FAMILIES, [one for one in results() if one["seed"] == 0])))


def test_with_one_arm_each_row_is_compared_with_the_first_row_of_the_same_seed():
    table = TABLES["crops"]
    arm = table.arms[0].name
    values = {("swapped", 0): 0.5, ("swapped", 1): 0.52, ("right", 0): 0.6, ("right", 1): 0.58, ("right", 2): 0.9}
    found = [result(row, arm, seed, top1) for (row, seed), top1 in values.items()]
    first, second = compare_all(table, found)
    assert not any(first.gains)
    assert second.gains == pytest.approx([0.1, 0.06])
    # The first row, which differs from itself by nothing, is no evidence of a small spread.
    assert pooled_deviation([first, second]) == pytest.approx(pooled_deviation([second]))
    text = markdown(table, {"labels": {"maps": LABELS}, "results": found})
    assert "| axes of the labels' crops swapped | 2 | 51.0 ± 1.0 % | |" in text
    assert "| labels cropped as the images are | 2 | 59.0 ± 1.0 % | +8.0 ± 2.0 |" in text


def test_seeds_of_two_commands_are_compared_by_the_spread_within_each():
    table = TABLES["crops"]
    right = [0.60, 0.62, 0.61, 0.70, 0.72, 0.71]
    found = [result("swapped", "token-labels", seed, 0.5) for seed in range(6)]
    found += [result("right", "token-labels", seed, top1) for seed, top1 in enumerate(right)]
    # Each half varies by one point; the gap of ten points is that of two means of three.
    assert gaps_of_halves(compare_all(table, found)) == [pytest.approx((0.1, 0.01 * math.sqrt(2 / 3)))]
    text = markdown(table, {"labels": {"maps": LABELS}, "results": found})
    assert "0 of 1 differences agree within two standard errors; the largest gap is 10.0 ± 0.8 points" in text
    assert "apart" not in markdown(table, {"labels": {"maps": LABELS}, "results": [r for r in found if r["seed"] < 4]})
    assert gaps_of_halves(compare_all(table, [r for r in found if r["seed"] < 3])) == []


def test_the_table_says_what_was_found():
    found = {"labels": {"maps": LABELS}, "results": results()}
    text = markdown(FAMILIES, found)
    assert "| DeMansia, `mamba` | 400,000 | 2 | 41.0 % | 46.0 % | +5.0 ± 1.0 |" in text
    assert "| Vim | 400,000 | 2 | 31.0 % | 31.0 % | +0.0 ± 1.0 |" in text
    assert "Mean difference of the 2 rows: +2.5 ± 2.5 points" in text
    assert "9 runs took 4.5 hours of one core" in text
    one = markdown(FAMILIES, {"labels": {}, "results": [r for r in results() if r["seed"] == 0]})
    assert "| DeMansia, `mamba` | 400,000 | 1 | 40.0 % | 44.0 % | +4.0 |" in one
    assert "teacher" not in one


def test_the_picture_has_each_table_that_has_results(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "_panel", lambda _, table, rows: shown.append((table.name, [row.row for row in rows])))
    plots.draw(TABLES.values(), tmp_path, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
    crops = [result(row, TOKEN_LABELS.name, 0, top1) for row, top1 in (("swapped", 0.5), ("right", 0.6))]
    for name, found in (("families", results()), ("crops", crops)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"labels": {}, "results": found}))
    plots.draw(TABLES.values(), tmp_path, tmp_path / "picture.png")
    assert shown == [("families", ["demansia", "vim"]), ("crops", ["right"])]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_the_picture_is_a_mean_gain_in_points_with_its_error():
    from matplotlib.figure import Figure

    plot = Figure().subplots()
    plots._panel(plot, FAMILIES, compare_all(FAMILIES, results()))
    (points, _, (errors,)) = plot.containers[0]
    assert points.get_xdata() == pytest.approx([5.0, 0.0], abs=1e-9)
    widths = [ends[1][0] - ends[0][0] for ends in errors.get_segments()]
    assert widths == pytest.approx([2.0, 2.0])


def test_a_table_replaces_the_one_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- table: a -->\nold\n{END}\nbetween\n<!-- table: b -->\n{END}\nafter\n")
    fill(page, "a", r"new \1")
    assert page.read_text() == (
        f"before\n<!-- table: a -->\nnew \\1\n{END}\nbetween\n<!-- table: b -->\n{END}\nafter\n"
    )
    with pytest.raises(InputError, match="has no place for the table"):
        fill(page, "c", "new")


def test_runs_go_seed_by_seed_and_differ_in_one_thing_only(tmp_path):
    runs = plan(FAMILIES, ARMS, [0, 1], tmp_path)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.folder for run in runs}) == len(runs) == 4 * len(FAMILIES.rows)
    assert len(plan(FAMILIES, ARMS[:1], [0], tmp_path)) == len(FAMILIES.rows)
    one, other = (set(run.settings(pictures(tmp_path))) for run in runs[:2])
    assert {text.split("=")[0] for text in one ^ other} == {"run.out", "data.store"}


def test_tables_share_the_runs_that_are_the_same(tmp_path):
    runs = {name: {(run.row.name, run.seed): run for run in plan(TABLES[name], [TOKEN_LABELS.name], [0, 1], tmp_path)}
            for name in ("mosaics", "crops", "ways", "settings", "teachers", "budget")}  # fmt: skip
    one = runs["ways"][TOKEN_LABELS.name, 0].folder
    assert one == runs["crops"]["right", 0].folder != runs["mosaics"][TOKEN_LABELS.name, 0].folder
    assert one == runs["settings"]["default", 0].folder == runs["teachers"]["624", 0].folder
    assert one == runs["budget"]["steps-600", 0].folder
    assert runs["ways"]["image-label", 0].folder == runs["teachers"]["image-label", 0].folder
    folders = [run.folder for runs in runs.values() for run in runs.values()]
    assert len(folders) - len(set(folders)) == 2 * 5  # only those, for each seed


def test_results_of_other_seeds_rows_and_arms_stay(tmp_path):
    old = [*results(), result("a row of former times", ARMS[0], 0, 0.5)]
    new = result("vim", ARMS[1], 0, 0.99)
    kept = with_result(old, new, FAMILIES)
    assert [one for one in results() if one not in kept] == [result("vim", ARMS[1], 0, 0.31)]
    assert (kept[-1], len(kept)) == (new, len(results()))
    other = result("vim", ARMS[1], 7, 0.5)
    assert with_result(results(), other, FAMILIES) == [*results(), other]
    assert [run.row.name for run in plan(FAMILIES, ARMS[1:], [0], tmp_path, ["vim"])] == ["vim"]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_of_valid_recipes(name, tmp_path):
    table = TABLES[name]
    for run in plan(table, [arm.name for arm in table.arms], [0], tmp_path):
        load_recipe(table.recipe, run.settings(pictures(tmp_path)))
    assert stores_of(plan(table, [table.arms[-1].name], [0], tmp_path))


def test_every_teacher_is_a_valid_recipe_that_ends_far_below_its_highest_rate(tmp_path):
    runs = [run for table in TABLES.values() for run in plan(table, None, [0], tmp_path)]
    lengths = {labels.steps or STEPS for labels in stores_of(runs)}
    assert len(lengths) > 3
    for steps in lengths:
        config = load_recipe("teacher", teacher_settings(tmp_path, tmp_path / "weights", tmp_path / "out", steps))
        parameter = torch.nn.Parameter(torch.zeros(1))
        rate = LearningRate(torch.optim.SGD([parameter]), config.schedule, EPOCH)
        rates = [rate.set(step) for step in range(steps)]
        assert rates.index(max(rates)) < steps / 4
        assert rates[-1] < max(rates) / 10


def test_only_the_stores_of_what_is_trained_are_needed(tmp_path):
    assert not stores_of(plan(FAMILIES, ["image-label"], [0], tmp_path))
    ways = TABLES["ways"]
    assert not stores_of(plan(ways, None, [0], tmp_path, ["image-label"]))
    assert [labels.name for labels in stores_of(plan(ways, None, [0, 1], tmp_path))] == ["maps", "whole"]


@pytest.mark.parametrize("row", FAMILIES.rows, ids=lambda row: row.name)
def test_every_row_is_a_network_of_about_the_same_size_on_the_same_tokens(row, tmp_path):
    run = Run(FAMILIES, row, TOKEN_LABELS, 0, tmp_path)
    config = load_recipe(FAMILIES.recipe, run.settings(pictures(tmp_path)))
    assert 300_000 < parameters(config) < 700_000


def test_a_run_with_other_settings_counts_as_not_done(tmp_path, monkeypatch):
    data, run = pictures(tmp_path), plan(FAMILIES, ARMS[1:], [0], tmp_path)[0]
    assert run.result(data) is None
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text(json.dumps(result("demansia", ARMS[1], 0, 0.5)))
    from train.recipes.recipe import to_toml

    (run.folder / "config.toml").write_text(to_toml(load_recipe(FAMILIES.recipe, run.settings(data))))
    assert run.result(data)["top1"] == 0.5
    other = load_recipe(FAMILIES.recipe, [*run.settings(data), "optimizer.lr=1e-3"])
    (run.folder / "config.toml").write_text(to_toml(other))
    assert run.result(data) is None


def test_bad_usage_ends_before_anything_is_trained(tmp_path, capsys):
    place = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--page", str(tmp_path / "page.md")]
    for given, told in (
        ([], "got no --data"),
        (["--data", "x.zip"], "got neither"),
        (["--arms", "none"], "no such arm"),
        (["--rows", "vim", "wim"], "no such row: got 'wim'"),
        (["--data", str(tmp_path / "x.zip"), "--arms", "image-label"], "cannot be unpacked"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["families", *given, *place])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err


def test_the_table_of_costs_says_what_was_not_measured():
    figures = {"parameters": 8_060_000, "macs": 2_670_000_000, "train_ms": 480.4, "infer_ms": 150.2, "memory_mb": 280.0}
    found = {"rows": {"mamba": {"224": figures, "512": {"refused": "out of memory"}}, "vim": {"224": figures}}}
    lines = model_costs.table(found).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 11
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["DeMansia Tiny, `mamba`", "8.06M", "2.67", "150", "480", "280", "out of memory", "", "", ""]
    assert "not measured" in lines[3]


def test_the_table_of_growth_has_a_row_for_each_size_of_the_image():
    figures = {"infer_ms": 51.4, "infer_memory_mb": 20.0, "train_ms": 149.0, "memory_mb": 1_158.2}
    found = {"rows": {"mamba": {"1024": figures, "224": figures}, "deit": {"224": figures, "1024": {"refused": "x"}}}}
    lines = model_costs.growth_table(found).splitlines()
    assert lines[0].startswith(
        "| pixels | DeMansia Tiny: inference, ms | MB | training, ms | MB | DeiT-Tiny (timm): inf"
    )
    assert lines[2] == "| 224² | 51 | 20 | 149 | 1,158 | 51 | 20 | 149 | 1,158 |"
    assert lines[3] == "| 1,024² | 51 | 20 | 149 | 1,158 |  |  |  |  |"


def test_the_other_network_of_the_table_of_growth_is_measured_with_its_token_head():
    figures = model_costs.measure("deit", 32)
    assert figures["parameters"] > 5_700_000
    assert min(figures["train_ms"], figures["infer_ms"]) > 0


def test_a_size_that_a_model_refuses_is_an_answer():
    assert "multiples of" in model_costs.measure("mila", 100)["refused"]


def test_pages_have_a_place_for_each_table():
    docs = Path(__file__).parents[1] / "docs"
    for name in TABLES:
        assert f"<!-- table: {name} -->" in (docs / "evidence.md").read_text()
    assert "<!-- table: model costs -->" in (docs / "models.md").read_text()
    assert "<!-- table: growth costs -->" in (docs / "evidence.md").read_text()


def test_a_table_of_true_maps_says_nothing_of_a_teacher():
    table = TABLES["small-crops"]
    results = [
        {"row": row.name, "arm": "token-labels", "seed": 0, "top1": 0.2, "parameters": 5, "cpu_seconds": 36.0}
        for row in table.rows
    ]
    labels = {"true-8": {"teacher": None, "agreement": 0.795, "bytes": 168.0}}
    text = markdown(table, {"labels": labels, "results": results})
    assert "teacher" not in text
    assert "79.5 % of the maps name the image's class." in text
