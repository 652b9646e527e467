"""Recipes at the door: what is wrong is named in one line, with what is expected and the nearest valid name."""

from __future__ import annotations

import re
import string
import tomllib

import numpy as np
import pytest
from faults import tally

from labeler import InputError
from train.__main__ import main
from train.recipes.config import LossConfig, TrainConfig
from train.recipes.recipe import RECIPES, flat, load_recipe, parse_config, recipe_names, to_toml
from train.record.continuation import differences

VALID = '[model]\nname = "demansia_nano"\n[data]\nimages = "images"\nstore = "labels"\n'
FOUND_IN_FILE = {
    # what is wrong: the file's text, and what the error says of it
    "section": (VALID + "[optimiser]\nlr = 1", "unknown section 'optimiser'. Did you mean 'optimizer'?"),
    "section that is missing for it": (
        "[modle]\nname = 'x'",
        "unknown section 'modle' (2 more). Did you mean 'model'?",
    ),
    "key": (VALID + "[optimizer]\nlrr = 1", "unknown key 'optimizer.lrr'. Did you mean 'lr'?"),
    "key like no other": (VALID + "[ema]\nx = 1", "unknown key 'ema.x'. Choose from: decay, warmup."),
    "key that is missing for it": (
        "[model]\nname = 'x'\n[data]\nimagess = 'i'",
        "unknown key 'data.imagess' (1 more). Did you mean 'images'?",
    ),
    "missing section": ("", "model is missing (1 more). Add a section [model]."),
    "missing key": ("[model]\n[data]\nimages = 'i'\nstore = 's'", "model.name is missing. Add it there, or pass"),
    "missing store": ("[model]\nname = 'x'\n[data]\nimages = 'i'", "label the images first, or set data.token_labels"),
    "value for a section": ("loss = 3\n" + VALID, "loss: got 3, expected a section"),
    "number as text": (VALID + '[optimizer]\nlr = "1e-3"', "got '1e-3', expected a number. Remove the quotes."),
    "count as text": (VALID + '[run]\nkeep = "2"', "got '2', expected a whole number. Remove the quotes."),
    "text as number": (VALID + "[run]\nout = 3", "run.out: got 3, expected text in quotes"),
    "fraction of a count": (VALID + "[run]\nbatch_size = 1.5", "run.batch_size: got 1.5, expected a whole number"),
    "number as a switch": (VALID + "[run]\ncompile = 1", "run.compile: got 1, expected true or false"),
    "switch as a number": (VALID + "[optimizer]\nlr = true", "optimizer.lr: got True, expected a number"),
    "date": (VALID + "[run]\nout = 1979-05-27", "got a date or a time, which no setting takes"),
    "choice": (
        VALID + "[schedule]\nkind = 'cosin'",
        "got 'cosin', expected 'cosine', 'restarts', 'constant' or 'poly'",
    ),
    "short list": (VALID + "[augment]\nscale = [0.5]", "augment.scale: got [0.5], expected 2 values"),
    "long list": (VALID + "[augment]\nscale = [0.1, 0.5, 1]", "got [0.1, 0.5, 1], expected 2 values"),
    "argument of a model": (VALID + "[model.args]\nx = [[1]]", "model.args.x: got [[1]], expected true or false or a"),
    "negative rate": (VALID + "[optimizer]\nlr = -1e-3", "optimizer.lr: got -0.001, expected greater than 0"),
    "rate of zero": (VALID + "[optimizer]\nlr = 0", "optimizer.lr: got 0, expected greater than 0"),
    "temperature of zero": (VALID + "[loss]\ntemperature = 0", "loss.temperature: got 0, expected greater than 0"),
    "negative temperature": (VALID + "[loss]\nfinal_temperature = -1", "got -1, expected greater than 0"),
    "no number": (VALID + "[optimizer]\nlr = nan", "optimizer.lr: got nan, expected a finite number"),
    "infinity": (VALID + "[optimizer]\nweight_decay = inf", "got inf, expected a finite number"),
    "empty batch": (VALID + "[run]\nbatch_size = 0", "got 0, expected greater than or equal to 1"),
    "share over one": (VALID + "[augment]\nhflip = 1.1", "augment.hflip: got 1.1, expected less than or equal to 1"),
    "average that never moves": (VALID + "[ema]\ndecay = 1.0", "ema.decay: got 1.0, expected less than 1"),
    "seed beyond torch's": (VALID + f"[run]\nseed = {1 << 63}", "run.seed: got 9223372036854775808, expected less"),
    "more threads than any machine has": (VALID + "[run]\nthreads = 5000", "run.threads: got 5000, expected less than"),
    "zero byte": (VALID + '[run]\nout = "a\\u0000b"', "out contains a zero byte; give a path or a name"),
    "empty text": (VALID + "[run]\nout = ''", "out is empty; give a path or a name"),
    "long number": (VALID + f"[run]\nseed = {'9' * 5000}", "Exceeds the limit"),
    "nothing to learn": (VALID + "[loss]\ndense_weight = 0\ncls_weight = 0", "are both 0: nothing would be learned"),
    "lowest rate above the highest": (VALID + "[schedule]\nmin_lr = 1.0", "min_lr 1 is above optimizer.lr 0.001"),
    "warm-up without end": (VALID + "[schedule]\nwarmup_epochs = 300", "warmup_epochs is 300 of 300 epochs"),
    "half a pair": (VALID + "[run]\nmicro_batch = 3", "run.micro_batch is 3; make it even: images are mixed in pairs"),
    "key twice": (
        VALID + "[optimizer]\nlr = 1\nlr = 2\n",
        "is not a TOML file: got Cannot overwrite a value (at line 8",
    ),
    "deep list": (f"x = {'[' * 5000}", "got nesting that is too deep"),
    "deep section": (f"{VALID}[run.{'.'.join('a' * 3000)}]", "got nesting that is too deep"),
}
FOUND_IN_OVERRIDE = {
    "bad=1": "no section has a key 'bad'. Did you mean 'backend'?",
    "optimizer.lrr=1": "override 'optimizer.lrr=1': unknown key 'optimizer.lrr'. Did you mean 'lr'?",
    "optimzer.lr=1": "override 'optimzer.lr=1': unknown section 'optimzer'. Did you mean 'optimizer'?",
    "optimizer.lr='1e-3'": "optimizer.lr: got '1e-3', expected a number. Remove the quotes.",
    "optimizer.lr=1e-3x": "optimizer.lr: got '1e-3x', expected a number",
    "run.compile=True": "run.compile: got 'True', expected true or false",
    f"run.seed={'9' * 5000}": "run.seed: got '9999",
    f"run.seed={'[' * 5000}": "run.seed: got '[[[[",
    "name=vim_tiny": "an override needs its section: got 'name', expected model.name or optimizer.name",
    "model=vim_tiny": "an override names only a section: got 'model', expected model.key=value",
    "model.name.x=1": "got 'model.name.x=1', expected name to be a section",
    "optimizer.lr": "got 'optimizer.lr', expected section.key=value",
    "optimizer.=1": "got 'optimizer.=1', expected section.key=value",
    "=": "got '=', expected section.key=value",
    "run.out=\udcff": "an override is not UTF-8: got 'run.out=\\udcff'",
    f"{'a.' * 3000}b=1": "got nesting that is too deep",
}


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as found:
        load_recipe(*arguments)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500
    return str(found.value)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "mine.toml").write_text(VALID)
    return tmp_path / "mine.toml"


@pytest.mark.fault(35)
@pytest.mark.parametrize("fault", FOUND_IN_FILE)
def test_a_fault_in_a_recipe_is_named_with_its_file(recipe, fault):
    text, expected = FOUND_IN_FILE[fault]
    recipe.write_text(text)
    found = refusal(recipe)
    assert found.startswith(str(recipe))
    assert expected in found
    tally(35, injected=1)


@pytest.mark.fault(35)
@pytest.mark.parametrize("override", FOUND_IN_OVERRIDE, ids=lambda text: ascii(text[:20]))
def test_a_fault_in_an_override_is_named(recipe, override):
    assert FOUND_IN_OVERRIDE[override] in refusal(recipe, [override])
    tally(35, injected=1)


@pytest.mark.fault(35)
def test_a_file_that_is_no_text_or_too_large_is_refused(recipe):
    recipe.write_bytes(VALID.encode("utf-16"))
    assert "is not a TOML file: got 'utf-8' codec can't decode byte 0xff in position 0" in refusal(recipe)
    recipe.write_text(VALID + "#" * (2 << 20))
    assert "got 2,097,225 bytes, expected up to 1,048,576" in refusal(recipe)


def test_a_missing_recipe_is_answered_with_the_nearest_name():
    for wrong in ("demansia_tinny", "demansia-tiny", "recipes/demansia_tyny.toml"):
        found = refusal(wrong)
        assert f"no such recipe: got {wrong!r}" in found
        assert "Did you mean 'demansia_tiny'?" in found
    assert "Did you mean" not in refusal("xyz")


def test_overrides_are_toml_whose_quotes_and_section_may_be_left_away(recipe):
    overrides = ["lr = 5e-4", "run.out=runs/a b", "augment.scale=[0.5, 1]", "model.args.depth=3", "compile=true"]
    config = load_recipe(recipe, [*overrides, 'data.store="1e-3"', "run.seed=1", "run.seed=2"])
    assert config.optimizer.lr == 5e-4
    assert config.run.out == "runs/a b"
    assert config.augment.scale == (0.5, 1.0)
    assert config.model.args == {"depth": 3}
    assert config.run.compile is True
    assert config.data.store == "1e-3"
    assert config.run.seed == 2


def test_the_folder_of_a_run_is_named_for_its_recipe(recipe):
    assert load_recipe(recipe).run.out == "runs/mine"
    assert load_recipe(recipe, ["run.out=a/{recipe}/b"]).run.out == "a/mine/b"


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_is_valid_and_says_what_it_takes_and_gives(name):
    comment = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"python -m train fit {name} " in comment
    for fact in ("Hardware", "Time", "Result"):
        assert re.search(rf"{fact}: \w+", comment), fact
    config = load_recipe(name)
    assert parse_config(flat_sections(config), name) == config


def flat_sections(config: TrainConfig) -> dict:
    """What `to_toml` writes, read back."""
    import tomllib

    return tomllib.loads(to_toml(config))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "demansia_tiny",
            {
                "optimizer.name": "radamw", "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.05,
                "schedule.kind": "restarts", "schedule.first_cycle": 10, "schedule.cycle_factor": 2,
                "schedule.min_lr": 1e-6, "schedule.epochs": 310, "run.batch_size": 768, "run.precision": "bfloat16",
                "model.drop_path_rate": 0.1, "ema.decay": 0.9999, "loss.dense_weight": 1, "model.img_size": 224,
            },
        ),
        ("demansia_small", {"model.img_size": 384, "schedule.kind": "restarts", "run.batch_size": 768}),
        (
            "lvvit_s",
            {
                "optimizer.name": "adamw", "optimizer.lr": 1.6e-3, "optimizer.weight_decay": 0.05,
                "schedule.kind": "cosine", "schedule.epochs": 300, "schedule.cooldown_epochs": 10,
                "schedule.warmup_epochs": 5, "run.batch_size": 1024, "model.drop_path_rate": 0.1, "ema.decay": 0.99992,
            },
        ),
        (
            "demansia2_tiny",
            {
                "optimizer.name": "lion", "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.5,
                "schedule.kind": "cosine", "schedule.epochs": 300, "schedule.warmup_epochs": 10,
                "run.batch_size": 1024, "ema.decay": 0.9999, "run.precision": "bfloat16", "model.drop_path_rate": 0.0,
                "augment.crop_pct": 0.875,
            },
        ),
        ("lvvit_t", {"model.name": "lvvit_t", "optimizer.lr": 1.6e-3, "model.drop_path_rate": 0.1}),
        ("lvvit_m", {"model.name": "lvvit_m", "optimizer.lr": 1.6e-3, "model.drop_path_rate": 0.2}),
        (
            "lvvit_l",
            {
                "model.name": "lvvit_l", "optimizer.lr": 1e-3, "model.drop_path_rate": 0.3, "run.batch_size": 1024,
                "augment.auto_augment": "rand-n3-m9-mstd0.5-inc1",
            },
        ),
        ("vim_tiny", {"optimizer.weight_decay": 0.1, "model.drop_path_rate": 0.0, "ema.decay": 0.99996}),
        (
            "vim_small",
            {"optimizer.weight_decay": 0.05, "model.drop_path_rate": 0.05, "run.batch_size": 512, "optimizer.lr": 1e-3},
        ),
        ("vim_base", {"model.name": "vim_base", "optimizer.weight_decay": 0.05, "run.batch_size": 1024}),
        (
            "mila_tiny",
            {
                "optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.05,
                "optimizer.clip_grad": 5.0, "schedule.kind": "cosine", "schedule.epochs": 300,
                "schedule.warmup_epochs": 20, "run.batch_size": 1024, "model.drop_path_rate": 0.2, "ema.decay": 0.9999,
            },
        ),
        (
            "mambavision_tiny",
            {
                "optimizer.name": "lamb", "optimizer.lr": 5e-3, "optimizer.weight_decay": 0.05,
                "optimizer.clip_grad": 5.0, "schedule.kind": "cosine", "schedule.epochs": 300,
                "schedule.cooldown_epochs": 10, "schedule.warmup_epochs": 20, "schedule.min_lr": 5e-6,
                "run.batch_size": 4096, "model.drop_path_rate": 0.2,
            },
        ),
        (
            "mambaout_tiny",
            {
                "optimizer.name": "adamw", "optimizer.lr": 4e-3, "optimizer.weight_decay": 0.05,
                "schedule.kind": "cosine", "schedule.epochs": 300, "schedule.warmup_epochs": 20,
                "run.batch_size": 4096, "model.drop_path_rate": 0.2, "augment.mix": "image",
            },
        ),
    ],
)  # fmt: skip
def test_recipes_of_papers_have_their_settings(name, expected):
    augment = {
        "scale": (0.08, 1.0), "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random",
        "erase_prob": 0.25, "erase_mode": "pixel", "mix": "token", "mix_alpha": 1.0,
    }  # fmt: skip
    found = flat(load_recipe(name))
    shared = {"loss.smoothing": 0.1, **{f"augment.{key}": value for key, value in augment.items()}}
    expected = {**shared, **expected}
    assert {key: found[key] for key in expected} == expected


def test_the_temperature_moves_in_a_straight_line_from_the_first_step_to_the_last():
    falling = LossConfig(temperature=4.0, final_temperature=1.0)
    assert [falling.temperature_at(step, 5) for step in range(5)] == [4.0, 3.25, 2.5, 1.75, 1.0]
    assert falling.temperature_at(0, 1) == 4.0
    assert LossConfig(final_temperature=2.0).temperature_at(500, 1001) == 1.5
    assert {LossConfig(temperature=3.0).temperature_at(step, 5) for step in range(5)} == {3.0}
    assert {LossConfig().temperature_at(step, 5) for step in range(5)} == {1.0}


def test_a_configuration_written_as_a_recipe_reads_back_the_same():
    """Numbers in their shortest form, and texts with every ASCII character, quotes and controls too."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        text = "".join(rng.permutation(list(string.printable + "\x1b\x7fé😀\u2028")))
        numbers = [float(x) for x in 10.0 ** rng.uniform(-300, -3, 3)]
        values = {
            "model": {"name": text, "args": {text: numbers[0], "whole": 1, "number": 1.0, "yes": True, "text": "1"}},
            "data": {"images": text, "store": "s"},
            "augment": {"mean": numbers, "scale": [0.1, 1]},
            "optimizer": {"lr": 1e-3, "betas": [0.9, numbers[1]], "eps": numbers[2], "clip_grad": 5e22},
            "run": {"seed": int(rng.integers(1 << 62)), "out": "a"},
        }
        config = parse_config(values, "test")
        again = parse_config(flat_sections(config), "test")
        assert again == config
        assert {key: type(value) for key, value in again.model.args.items()} == {
            key: type(value) for key, value in config.model.args.items()
        }
        assert differences(config, again) == {}


@pytest.mark.fault(35)
def test_a_wrong_command_says_so_in_one_line_with_status_2(capsys):
    for arguments in (["demo", "bad=1"], ["demo", "optimizer.lr=-1"], ["nothing"]):
        assert main(["fit", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1


def test_overrides_and_flags_come_in_any_order(recipe, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("train.recipes.recipe.refuse_absent_paths", lambda config: None)
    monkeypatch.setattr("train.trainer.fit", lambda config, resume: given.append((config, resume)) or 1 / 0)
    orders = (
        ["a", "--resume", "auto", "--quiet", "b"],
        ["--quiet", "a", "b", "--resume=auto"],
        ["a", "b", "--resume", "auto"],
    )
    names = {"a": "lr=0.5", "b": "run.seed=3"}
    for order in orders:
        with pytest.raises(ZeroDivisionError):
            main(["fit", str(recipe), *(names.get(text, text) for text in order)])
    assert {(config.optimizer.lr, config.run.seed, resume) for config, resume in given} == {(0.5, 3, "auto")}
    for wrong in (["fit", str(recipe), "--quite", "lr=0.5"], ["doctor", "lr=0.5"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
        assert "error: unrecognized arguments: " in capsys.readouterr().err


def test_the_list_of_recipes_prints_their_headers(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in recipe_names():
        assert f"python -m train fit {name} " in printed
    assert "top-1 79.37, top-5 94.51" in printed
    assert "#" not in printed


OPTIONAL = [name for name, value in flat(parse_config(tomllib.loads(VALID), "a test")).items() if value is None]


@pytest.mark.parametrize("none", ["none", "None", "", " "])
def test_every_setting_that_may_be_unset_can_be_by_an_override(recipe, none):
    given = {
        "model.num_classes": 3, "model.aux_weight": 0.1, "model.weights": "'w'", "data.validation": "'v'",
        "data.image_list": "'l'", "data.threads": 2, "augment.mean": [0.5] * 3, "augment.std": [0.5] * 3,
        "loss.final_temperature": 2.0, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8,
        "optimizer.layer_decay": 0.7, "optimizer.clip_grad": 1.0, "schedule.steps": 10, "ema.decay": 0.9,
        "run.micro_batch": 2, "run.threads": 1, "run.save_every": 5, "lora.rank": 4, "lora.targets": ["in_proj"],
        "segmentation.masks": "'m'", "segmentation.validation_masks": "'v'", "segmentation.class_names": ["a", "b"],
    }  # fmt: skip
    assert given.keys() == set(OPTIONAL), "a new optional setting belongs in this test"
    with recipe.open("a") as file:
        file.write("token_labels = false\n")
    full = load_recipe(recipe, [f"{key}={value}" for key, value in given.items()])
    assert None not in [flat(full)[key] for key in OPTIONAL]
    recipe.write_text(to_toml(full))
    found = flat(load_recipe(recipe, [f"{key}={none}" for key in [*OPTIONAL, "data.store"]]))
    assert {key: found[key] for key in [*OPTIONAL, "data.store"]} == dict.fromkeys([*OPTIONAL, "data.store"])


def test_arguments_of_a_model_can_be_unset_and_a_choice_called_none_stays_one(recipe):
    config = load_recipe(
        "cifar10_nano", ["model.args.depth=none", "model.args.not_there=", "augment.mix=none", "cache=none"]
    )
    assert config.model.args == {"patch_size": 4, "embed_dim": 64, "d_state": 4, "expand": 1}
    assert (config.augment.mix, config.data.cache) == ("none", "none")
    assert "model.name" in refusal(recipe, ["model.name="])
    assert "run.seed: got 'none', expected a whole number" in refusal(recipe, ["run.seed=none"])


def test_a_packaged_recipe_trains_plainly_and_its_absent_paths_do_not_block_other_data(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    plain = load_recipe("demansia_tiny", ["data.images=x", "data.token_labels=false", "store=none", "ema.decay=none"])
    assert (plain.data.store, plain.ema.decay) == (None, None)
    with caplog.at_level("WARNING"):
        other = load_recipe("cifar10_nano", ["images=mine", "token_labels=false"])
    assert (other.data.store, other.data.validation) == (None, None)
    assert "data.validation runs/cifar10/images/test does not exist: no evaluation" in caplog.text
    assert "data.store is missing; label the images first" in refusal("cifar10_nano", ["data.images=mine"])
    (tmp_path / "runs/cifar10/images/test").mkdir(parents=True)
    assert load_recipe("cifar10_nano", ["data.images=mine", "token_labels=false"]).data.validation is not None
    assert load_recipe("cifar10_nano", ["data.images=mine", "store=s", "validation=v"]).data.validation == "v"


@pytest.mark.parametrize(
    "text", ["2024", "2024-05-01", "12:30:00", "true", "1e-3", r"runs\2024\new", "[a]", "a # b", "{b}"]
)
def test_text_without_quotes_is_taken_as_given(recipe, text):
    found = load_recipe(
        recipe, [f"run.out={text}", f"data.images={text}", f"validation={text}", f"optimizer.name={text}"]
    )
    assert (found.run.out, found.data.images, found.data.validation, found.optimizer.name) == (text,) * 4
    for quoted in (f"'{text}'", to_toml(found).split("out = ")[1].splitlines()[0]):
        assert load_recipe(recipe, [f"run.out={quoted}"]).run.out == text


@pytest.mark.parametrize("text", [r'"runs\2024\new"', '"runs', "'runs", "'a'b'", '""runs"', "'a' 'b'"])
def test_malformed_quotes_are_refused(recipe, text):
    for key in ("run.out", "model.args.act_layer", "schedule.kind"):
        found = refusal(recipe, [f"{key}={text}"])
        assert "quotes of override" in found
        assert "Remove them, or use single quotes" in found


def test_a_whole_section_of_arguments_can_be_given(recipe):
    assert load_recipe(recipe, ["model.args={depth=3, name='a b'}"]).model.args == {"depth": 3, "name": "a b"}


def test_a_backslash_that_quotes_would_make_a_line_break_is_refused(recipe):
    assert "contains a control character: got 'runs\\new'" in refusal(recipe, ['run.out="runs\\new"'])
    assert load_recipe(recipe, ["run.out='runs\\new'"]).run.out == "runs\\new"


def test_a_date_is_refused_with_its_override(recipe):
    found = refusal(recipe, ["optimizer.lr=2024-05-01"])
    assert found.startswith("override 'optimizer.lr=2024-05-01': optimizer.lr: got '2024-05-01', expected a number")
    assert "override 'augment.scale=[2024-05-01, 1]'" in refusal(recipe, ["augment.scale=[2024-05-01, 1]"])


def test_epochs_that_are_asked_for_take_the_place_of_a_recipes_steps(caplog):
    assert load_recipe("demo").schedule.steps == 400
    asked = load_recipe("demo", ["epochs=3"]).schedule
    assert (asked.epochs, asked.steps) == (3.0, None)
    both = load_recipe("demo", ["epochs=3", "schedule.steps=7"]).schedule
    assert (both.epochs, both.steps) == (3.0, 7)


def test_a_flag_of_other_programs_is_told_how_it_is_said_here(capsys):
    for flags, said in (
        (["--lr", "1e-3"], "unrecognized arguments: --lr. Settings are given as lr=VALUE, without dashes."),
        (["--batch-size=8"], "--batch-size=8. Settings are given as batch_size=VALUE, without dashes."),
        (["--nonsense"], "unrecognized arguments: --nonsense. See"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "demo", *flags])
        assert said in capsys.readouterr().err


def test_a_command_without_its_recipe_asks_for_the_recipe_alone(capsys):
    with pytest.raises(SystemExit):
        main(["fit"])
    assert capsys.readouterr().err.startswith("error: the following arguments are required: recipe. See")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.args={depths=[1, 2], dims=[48, 96]}", {"depths": [1, 2], "dims": [48, 96]}),
        (
            "model.args={mixer_options={head_dim=32, shortcut=true}}",
            {"mixer_options": {"head_dim": 32, "shortcut": True}},
        ),
    ],
)
def test_arguments_of_a_model_may_be_lists_and_tables(override, expected):
    config = load_recipe("cifar10_nano", ["data.images=.", "data.store=none", override])
    assert config.model.args == expected
    assert parse_config(flat_sections(config), "again") == config


def test_a_table_in_a_table_is_refused():
    with pytest.raises(InputError, match=r"override 'model.args.x=.*expected .* or a list"):
        load_recipe("cifar10_nano", ["data.images=.", "data.store=none", "model.args.x={a={b=1}}"])
