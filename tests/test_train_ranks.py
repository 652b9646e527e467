"""Two ranks: interrupted and resumed bit for bit, none left waiting for one that is gone, refusals in one line."""

from __future__ import annotations

import random
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import counts, tally
from forked_runs import Blow, Ended, forks
from tiny_runs import FULL, outcome, tiny_config, tiny_data, write_recipe

from labeler import MismatchError
from pipeline.order import EpochOrder
from train import TrainConfig, fit
from train.ranks.distributed import Ranks
from train.recipes.recipe import load_recipe
from train.record.run_folder import locked
from train.trainer import Trainer

RUN, FORWARD = "train.task:TrainingStep.run", "train.task:TokenLabelTask.forward"
SAVE, WRITE = "train.record.run_folder:RunRecord.save", "train.record.checkpoint:_write"
COUNT = "train.evaluation.evaluate:count_right"
# Two forward passes of each rank make a step, three steps an epoch; an evaluation asks two networks about six batches.
PLACES: dict[str, Callable[[random.Random], Blow]] = {
    "between steps": lambda draw: Blow(RUN, draw.randint(1, 3), rank=draw.randrange(2)),
    "before an accumulation's end": lambda draw: Blow(FORWARD, 2 * draw.randint(1, 3), rank=draw.randrange(2)),
    "between update and average": lambda draw: Blow("train.task:TokenLabelTask.update_ema", 1, rank=draw.randrange(2)),
    "between a checkpoint's system calls": lambda draw: Blow(SAVE, 1, draw.randrange(30)),
    "in half a file of a checkpoint": lambda draw: Blow(WRITE, draw.randint(1, 4), half=True),
    "in the middle of an evaluation": lambda draw: Blow(COUNT, 3, rank=draw.randrange(2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def undisturbed(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The recipe of a run of twelve steps on two ranks, each of two micro-batches; the run is done."""
    folder = tmp_path_factory.mktemp("undisturbed")
    overrides = {
        **FULL,
        "data.validation": str(data[0]),
        "run.batch_size": 8,
        "run.micro_batch": 2,
        "schedule.steps": 12,
    }
    config = tiny_config(*data, folder / "run", **overrides)
    for ended in forks().fit(write_recipe(config, folder / "recipe.toml"), ranks=2):
        assert ended.status == 0, ended.errors
    return config


@pytest.fixture
def recipe(undisturbed: TrainConfig, tmp_path: Path) -> Path:
    """The same, not begun, in the folder `tmp_path / "run"`."""
    run = undisturbed.run.model_copy(update={"out": str(tmp_path / "run")})
    return write_recipe(undisturbed.model_copy(update={"run": run}), tmp_path / "recipe.toml")


def last_line(ended: Ended) -> str:
    assert "Traceback" not in ended.errors
    return ended.errors.splitlines()[-1]


@pytest.mark.fault(30)
@pytest.mark.fault(32)
def test_two_ranks_of_which_one_is_killed_repeatedly_end_bit_for_bit_as_those_left_alone(undisturbed, recipe, tmp_path):
    draw = random.Random(5)
    kills = [*PLACES, *draw.sample(sorted(PLACES), 4)]
    draw.shuffle(kills)
    kills = kills[: counts(5, 10)]
    for kill in kills:
        blow = PLACES[kill](draw)
        ended = forks().fit(recipe, "--resume", "auto", ranks=2, blow=blow)
        killed, other = ended[blow.rank], ended[1 - blow.rank]
        assert killed.status == -signal.SIGKILL, f"{kill}: {ended}"
        assert other.status == 1, f"{kill}: {ended}"
        assert other.seconds - killed.seconds < 60
        assert last_line(other).startswith("error: another rank is gone: got ")
    for ended in forks().fit(recipe, "--resume", "auto", ranks=2):
        assert ended.status == 0, ended.errors
    assert outcome(tmp_path / "run") == outcome(Path(undisturbed.run.out))
    tally(32, kills=len(kills))
    tally(30, kills=len(kills), resumed=len(kills), resumed_equal=len(kills))


@pytest.mark.fault(28)
def test_a_signal_to_one_rank_stops_both_with_everything_saved(undisturbed, recipe, tmp_path):
    blow = Blow(FORWARD, 3, rank=1)
    for number, step in ((signal.SIGTERM, 2), (signal.SIGINT, 4)):
        for ended in forks().fit(recipe, "--resume", "auto", ranks=2, blow=replace(blow, number=number)):
            assert ended.status == 143, ended.errors
            assert last_line(ended) == f"error: stopped after step {step}. --resume auto continues from there."
    for ended in forks().fit(recipe, "--resume", "auto", ranks=2):
        assert ended.status == 0, ended.errors
    assert outcome(tmp_path / "run") == outcome(Path(undisturbed.run.out))
    tally(28, injected=2, resumed=2, resumed_equal=2)


@pytest.mark.fault(31)
def test_a_run_of_two_ranks_goes_on_alone_with_the_same_images_in_each_step(undisturbed, recipe, tmp_path, caplog):
    for ended in forks().fit(recipe, ranks=2, blow=Blow(RUN, 5, number=signal.SIGTERM)):
        assert ended.status == 143, ended.errors
    config = load_recipe(recipe)
    trainer = Trainer(config, Ranks(0, 1, torch.device("cpu")), "auto")
    assert "resumed on 1 ranks instead of 2: every step sees the same images" in caplog.text
    step = trainer.step
    assert 0 < step < 12
    order = EpochOrder(24, 8, seed=config.run.seed)
    for epoch in range(step // 3, 4):
        shuffled = order.epoch(epoch)
        for place, batch in enumerate(trainer.loader, step % 3 if epoch == step // 3 else 0):
            expected = {trainer.loader.samples.key(i) for i in shuffled[8 * place : 8 * place + 8]}
            assert set(batch.keys) == expected
    with locked(Path(config.run.out)):
        summary = Trainer(config, Ranks(0, 1, torch.device("cpu")), "auto").run()
    assert summary.steps == 12
    tally(31, injected=1)


@pytest.mark.fault(31)
def test_other_ranks_with_another_batch_are_refused(undisturbed):
    run = undisturbed.run.model_copy(update={"batch_size": 4})
    with pytest.raises(MismatchError, match=r"belongs to another run: got run\.batch_size 4, expected .* 8\. "):
        fit(undisturbed.model_copy(update={"run": run}), resume="auto")
    tally(31, injected=1)


def test_only_the_first_of_two_ranks_speaks(undisturbed, tmp_path):
    recipe = write_recipe(undisturbed, tmp_path / "recipe.toml")
    first, second = forks().fit(recipe, "--resume", "auto", "--json", ranks=2)
    assert (first.status, second.status) == (0, 0)
    assert '"top1":' in last_line(first)
    assert '"top1":' not in second.errors


def test_where_the_first_rank_is_refused_the_second_does_not_wait(recipe, tmp_path):
    with locked(tmp_path / "run"):
        first, second = forks().fit(recipe, ranks=2)
    assert (first.status, second.status) == (2, 1)
    assert last_line(first).startswith("error: another process is training in ")
    assert last_line(second).startswith("error: another rank is gone")
    assert second.seconds < 60


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(data, tmp_path):
    recipe = write_recipe(tiny_config(*data, tmp_path / "run", **{"run.batch_size": 5}), tmp_path / "recipe.toml")
    for ended in forks().fit(recipe, ranks=2):
        assert ended.status == 2
        assert last_line(ended) == (
            "error: run.batch_size does not divide among the ranks: got 5 on 2. Use 4, or another number of ranks."
        )


def test_a_port_in_use_is_refused_in_one_line(recipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        [ended] = forks().fit(recipe, environment=world)
    assert ended.status == 2
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 is in use: got .*--master-port.*\n", ended.errors)


@pytest.mark.parametrize(
    ("world", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK does not fit WORLD_SIZE: got 2 of 2. Start ranks with torchrun."),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is not a number: got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set: got WORLD_SIZE=2. Start ranks with torchrun."),
    ],
)
def test_an_environment_that_names_no_place_among_ranks_is_refused_in_one_line(recipe, world, said):
    [ended] = forks().fit(recipe, environment=world)
    assert (ended.status, ended.errors) == (2, f"error: {said}\n")
