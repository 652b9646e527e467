"""Stores that travel: pushed and pulled whole, or not complete and said so; hostile places are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from faults import counts
from hub_server import hub_server
from remote_servers import flaky_server, needs_http, needs_s3, s3_service
from test_labeler_fit_head import config_of, make_coloured
from tiny import make_images

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, MismatchError, label_images
from labeler.__main__ import main
from labeler.base.errors import RemoteError
from labeler.base.whole_files import sealed
from labeler.checks.verify import verify_store
from labeler.remote import remote_files
from labeler.remote.failures import Patience
from labeler.remote.remote_files import RemoteFolder
from labeler.share.pull_store import pull_store
from labeler.share.push_store import push_store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """Twelve shards of two images."""
    folder = tmp_path_factory.mktemp("share")
    work = {"shard_size": 2, "batch_size": 3, "decoder": "pil", "threads": 1, "progress": False}
    label_images(make_images(folder / "images", 24), folder / "labels", LabelerConfig(TINY, **work))
    return folder / "labels"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits between tries."""
    monkeypatch.setattr(remote_files, "Patience", lambda: Patience(tries=4, seconds=20, first=0.01, longest=0.05))


@pytest.fixture(params=["folder", "file", "memory", pytest.param("s3", marks=needs_s3)])
def place(request, tmp_path, monkeypatch) -> str:
    """An empty place to push to."""
    if request.param == "s3":
        with s3_service(monkeypatch) as url:
            yield f"{url}/some/labels"
    else:
        path = tmp_path / "there"
        yield {"folder": str(path), "file": f"file://{path}", "memory": f"memory://{tmp_path.name}/labels"}[
            request.param
        ]


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "README.md"}


def pushed(labels: Path, tmp_path: Path) -> Path:
    push_store(labels, tmp_path / "there")
    return tmp_path / "there"


def test_a_store_comes_back_as_it_was(labels, place, tmp_path):
    first = push_store(labels, place)
    assert (first.shards, first.rows, first.files, first.skipped) == (12, 24, 1 + 12 + 3 + 12, 0)
    back = pull_store(place, tmp_path / "back")
    assert (back.files, back.rows) == (12, 24)
    assert content(tmp_path / "back") == content(labels)
    assert LabelStore(tmp_path / "back").fingerprint == LabelStore(labels).fingerprint
    again = push_store(labels, place)
    assert (again.files, again.bytes, again.skipped) == (0, 0, 12)
    assert pull_store(place, tmp_path / "back").files == 0


def test_what_is_there_is_not_sent_again_and_what_is_missing_is(labels, tmp_path):
    there = pushed(labels, tmp_path)
    shards = sorted(there.glob("*.h5"))
    kept = {path.name: path.stat().st_ino for path in shards}
    shards[3].unlink()
    shards[3].with_name(shards[3].name.split(".")[0] + ".json").unlink()
    done = push_store(labels, there)
    assert (done.files, done.skipped) == (2, 11)
    assert content(there) == content(labels)
    assert sum(path.stat().st_ino == kept[path.name] for path in sorted(there.glob("shard*.h5"))) >= 11


def test_the_markers_are_sent_last_so_that_a_part_is_never_taken_for_a_store(labels, tmp_path, monkeypatch):
    """Wherever a push ends, the place is whole or says that it is not."""
    whole = len(content(labels)) + 1
    for steps in range(0, whole + 1, 3):
        place, left = tmp_path / f"there{steps}", [steps]
        put = RemoteFolder.put

        def some(self, name, source, left=left, put=put):
            left[0] -= 1
            if left[0] < 0:
                raise RemoteError("the network is gone")
            put(self, name, source)

        monkeypatch.setattr(RemoteFolder, "put", some)
        if steps < whole:
            with pytest.raises(RemoteError, match="the network is gone"):
                push_store(labels, place)
        else:
            push_store(labels, place)
        monkeypatch.setattr(RemoteFolder, "put", put)
        if steps < whole:
            wanted = "is not complete: got" if (place / "plan.json").exists() else "is not a label store"
            with pytest.raises((IntegrityError, InputError), match=wanted):
                pull_store(place, tmp_path / f"back{steps}")
        push_store(labels, place)
        pull_store(place, tmp_path / f"back{steps}")
        assert content(tmp_path / f"back{steps}") == content(labels)


# Forks for each command that it reads, and kills it after some time, unless it ended before. Transfers of single files
# take a while there, so that a kill meets them.
FORKS = """
import json, os, signal, sys, time
from labeler.__main__ import main
from labeler.remote import file_systems
from labeler.remote.remote_files import RemoteFolder
import labeler.share.push_store, labeler.share.pull_store

write, part = file_systems.write, RemoteFolder._part
def slow_write(*given):
    write(*given)
    time.sleep(0.02)  # before the file has its name
def slow_part(*given):
    time.sleep(0.02)
    return part(*given)
file_systems.write, RemoteFolder._part = slow_write, slow_part
print("ready", flush=True)
for line in sys.stdin:
    command, seconds = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a command that ends early says what it did
        os._exit(main([*command, "--quiet"]))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture
def killed():
    """A function that runs a command for some seconds at most, and returns whether it was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-c", FORKS]
    forks = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert forks.stdout.readline() == "ready\n"

    def run(command: list[str], seconds: float) -> bool:
        forks.stdin.write(json.dumps([command, seconds]) + "\n")
        forks.stdin.flush()
        ended = forks.stdout.readline()
        assert ended in ("killed\n", "0\n")
        return ended == "killed\n"

    yield run
    forks.communicate()


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_push_and_a_pull_that_are_killed_ten_times_each_end_whole(labels, tmp_path, killed, command):
    """Each begins anew and is killed twice, at moments spread over the 0.3 s that it takes at the least."""
    early, times = 0, counts(10, 40)
    for number in range(times):
        there = tmp_path / f"there {number}"
        for _ in range(2):
            early += killed([command, str(labels), str(there)], 0.25 * (number + 0.5) / times)
            assert all(_is_one_of(path, labels) for path in there.glob("shard-*.h5"))
        (push_store if command == "push" else pull_store)(labels, there)
        assert content(there) == content(labels)
    assert early >= times // 2


def _is_one_of(path: Path, labels: Path) -> bool:
    return (labels / path.name).read_bytes() == path.read_bytes()


@needs_http
def test_a_pull_lives_through_a_bad_server(labels, tmp_path):
    with flaky_server(labels) as server:
        server.faults = [(".h5", "drop"), ("00003", 503), (".json", "hang up"), (".h5", "flip"), (".json", "cut")] * 2
        pull_store(server.url, tmp_path / "back")
        assert not server.faults
    assert content(tmp_path / "back") == content(labels)


@needs_http
def test_a_server_that_always_gives_other_bytes_is_refused_by_name(labels, tmp_path):
    with flaky_server(labels) as server:
        server.faults = [("shard-00004-of-00012.", "flip")] * 99
        with pytest.raises(IntegrityError, match=rf"{server.url}/shard-00004-of-00012\.\S+ is damaged"):
            pull_store(server.url, tmp_path / "back")
        server.faults = []
        assert not list((tmp_path / "back").glob("shard-00004*"))
        pull_store(server.url, tmp_path / "back")
    assert content(tmp_path / "back") == content(labels)


def test_another_store_there_or_here_is_left_alone(labels, store, tmp_path):
    there = pushed(labels, tmp_path)
    with pytest.raises(MismatchError, match=r"there is another store at file://.*: got another plan\.json"):
        push_store(store, there)
    with pytest.raises(MismatchError, match="has another store than file://"):
        pull_store(there, store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"is not empty and not a label store: got thesis\.tex"):
        pull_store(there, tmp_path / "mine")
    assert content(there) == content(labels)


def test_shards_of_the_same_plan_with_other_labels_are_not_mixed(labels, tmp_path):
    there = pushed(labels, tmp_path)
    shutil.copytree(labels, tmp_path / "other")
    marker = tmp_path / "other/shard-00002-of-00012.json"
    record = json.loads(marker.read_bytes())
    del record["xxh3"]
    record["stats"]["kl"] += 1
    marker.write_bytes(sealed(record))
    with pytest.raises(MismatchError, match=r"another shard-00002-of-00012\.json"):
        push_store(tmp_path / "other", there)
    with pytest.raises(MismatchError, match="has labels of its own: got shard 2 with other labels"):
        pull_store(there, tmp_path / "other")


def test_a_damaged_shard_here_is_not_pushed_and_a_pull_mends_it(labels, tmp_path):
    there = pushed(labels, tmp_path)
    shutil.copytree(labels, tmp_path / "other")
    shard = sorted((tmp_path / "other").glob("shard-*.h5"))[5]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=f"{shard.name}' is damaged"):
        push_store(tmp_path / "other", tmp_path / "elsewhere")
    assert pull_store(there, tmp_path / "other").files == 1
    assert content(tmp_path / "other") == content(labels)


def test_an_unfinished_store_is_not_pushed(labels, tmp_path):
    shutil.copytree(labels, tmp_path / "part")
    (tmp_path / "part/shard-00002-of-00012.json").unlink()
    with pytest.raises(IntegrityError, match="is not complete: got 11 of 12 shards"):
        push_store(tmp_path / "part", tmp_path / "there")
    with pytest.raises(InputError, match="is not a label store"):
        push_store(tmp_path / "nothing", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def reseal(path: Path, **changes: object) -> None:
    record = json.loads(path.read_bytes())
    del record["xxh3"]
    path.write_bytes(sealed({**record, **changes}))


@pytest.mark.parametrize(
    "name",
    [
        "shard-00002-of-00012./../../../escaped.h5", "shard-00002-of-00012.json", "shard-00002-of-00012.h5",
        "shard-00002-of-00012.\x1b[31m.h5", "shard-00002-of-00012.000000000000.h5",
    ],
)  # fmt: skip
def test_names_of_a_hostile_store_are_never_paths(labels, tmp_path, name):
    there = pushed(labels, tmp_path)
    marker = there / "shard-00002-of-00012.json"
    reseal(marker, file=name)
    with pytest.raises(IntegrityError, match="is damaged"):
        pull_store(there, tmp_path / "deep/back")
    assert not list(tmp_path.rglob("escaped*"))
    assert not list((tmp_path / "deep/back").glob("shard-*"))


def test_a_hostile_view_and_other_files_are_not_fetched(labels, tmp_path):
    there = pushed(labels, tmp_path)
    (there / "labels.h5").write_bytes(b"crafted")
    (there / "quarantine.jsonl").write_bytes(b"crafted")
    (there / "run_me.py").write_text("crafted")
    pull_store(there, tmp_path / "back")
    assert content(tmp_path / "back") == content(labels)


def test_a_shard_that_claims_another_size_is_refused_before_it_is_fetched(labels, tmp_path):
    there = pushed(labels, tmp_path)
    shard = sorted(there.glob("shard-00002*.h5"))[0]
    with open(shard, "ab") as file:
        file.truncate(10 << 30)  # sparse
    with pytest.raises(IntegrityError, match=r"is damaged: got 10737418240 bytes"):
        pull_store(there, tmp_path / "back")
    reseal(there / "shard-00002-of-00012.json", size=1 << 39)
    with pytest.raises(InputError, match="does not fit on the disk"):
        pull_store(there, tmp_path / "back")


def test_a_crafted_shard_goes_through_the_untrusted_opening(labels, tmp_path):
    """A shard whose digest is right, with content that the labeler never writes."""
    there = pushed(labels, tmp_path)
    old = sorted(there.glob("shard-00002*.h5"))[0]
    other = sorted(there.glob("shard-00003*.h5"))[0].read_bytes()
    digest = hashlib.sha256(other).hexdigest()
    name = f"shard-00002-of-00012.{digest[:12]}.h5"
    (there / name).write_bytes(other)
    old.unlink()
    reseal(there / "shard-00002-of-00012.json", file=name, sha256=digest, size=len(other))
    with pytest.raises(IntegrityError, match="is refused: got attributes differ from the plan: shard"):
        pull_store(there, tmp_path / "back")


def test_nothing_there_and_no_driver_are_told_in_one_line(labels, tmp_path, capsys):
    assert main(["pull", str(tmp_path / "nothing"), str(tmp_path / "back"), "--quiet"]) == 2
    assert main(["push", str(labels), "gs://bucket/labels", "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: file://{tmp_path}/nothing is not a label store: got no plan.json in it.")
    assert said[1] == "error: gs://bucket/labels needs a driver that is not installed. pip install gcsfs"
    assert not (tmp_path / "back").exists()


@needs_http
def test_a_pull_that_a_service_keeps_waiting_ends_at_a_signal(labels):
    """At once, also where every try would go on for minutes."""
    code = "import sys; from labeler.__main__ import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
    with socket.socket() as silent:  # takes connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/labels"
        child = subprocess.Popen(
            [sys.executable, "-c", code, "pull", url, "nowhere"], stdout=subprocess.PIPE, text=True
        )
        child.stdout.readline()
        time.sleep(1.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 143
        child.stdout.close()


def test_the_commands_say_what_they_did(labels, tmp_path, capsys):
    assert main(["push", str(labels), f"file://{tmp_path}/there", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 28
    assert main(["pull", f"file://{tmp_path}/there", str(tmp_path / "back"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("12 shards with 24 rows; 12 files, ")


def test_the_card_says_what_the_store_is_with_valid_front_matter(labels, tmp_path):
    there = pushed(labels, tmp_path)
    text = (there / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["pretty_name"] == "Token labels of 24 images by tiny:colour_teacher"
    assert head["size_categories"] == ["n<1K"]
    assert "license" not in head
    assert "# license: choose one" in front
    for part in ("24 with labels, 0 that could not", "4×4 cells", "`tiny:colour_teacher`", "## Licence", str(there)):
        assert part in body
    code = body.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 5
    exec(compile(code, "card", "exec"), {})


def test_the_hub_reads_the_card(labels, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra: hf)")
    card = hub.DatasetCard((pushed(labels, tmp_path) / "README.md").read_text(), ignore_metadata_errors=False)
    assert card.data.tags == ["token-labeling", "knowledge-distillation", "dense-labels"]
    assert card.data.task_categories == ["image-classification"]


def test_a_card_of_the_user_stays_on_either_side(labels, tmp_path):
    there = pushed(labels, tmp_path)
    (there / "README.md").write_text("written there")
    assert push_store(labels, there).files == 0
    pull_store(there, tmp_path / "back")
    assert (tmp_path / "back/README.md").read_text() == "written there"
    (tmp_path / "back/README.md").write_text("written here")
    assert push_store(tmp_path / "back", there).files == 1
    assert (there / "README.md").read_text() == "written here"
    assert pull_store(there, tmp_path / "back").files == 0
    assert (tmp_path / "back/README.md").read_text() == "written here"


def test_a_head_that_was_fitted_for_the_store_goes_along(tmp_path):
    images, store, there = make_coloured(tmp_path / "images"), tmp_path / "labels", tmp_path / "there"
    label_images(images, store, config_of())
    push_store(store, there)
    pull_store(there, tmp_path / "back")
    assert content(tmp_path / "back") == content(store)
    assert (tmp_path / "back/head.safetensors").exists()
    url = f"file://{there}"
    assert verify_store(url, images, relabel=3, trusted=True).problems == ()
    (there / "head.safetensors").write_bytes(b"crafted")
    with pytest.raises(IntegrityError, match=r"file://.*head\.safetensors is damaged: got sha256"):
        pull_store(there, tmp_path / "other")
    assert "head.safetensors' is damaged: got 7 bytes" in verify_store(url).problems[0]
    (store / "head.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"head\.safetensors' is damaged: got no such file"):
        push_store(store, tmp_path / "elsewhere")


def test_a_store_of_format_1_travels(tmp_path):
    old = ROOT / "tests/fixtures/store_1_0/labels"
    push_store(old, tmp_path / "there")
    pull_store(tmp_path / "there", tmp_path / "back")
    assert LabelStore(tmp_path / "back").fingerprint == LabelStore(old).fingerprint


def test_a_store_goes_through_the_hub_in_few_commits_and_is_private_at_first(labels, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra: hf)")
    with hub_server() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_testing", "HF_HUB_DISABLE_XET": "1"}
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

        def run(*command: str) -> None:
            environment = {**os.environ, **variables, "PYTHONPATH": paths}
            given = [sys.executable, "-m", "labeler", *command, "--quiet"]
            done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        hub.failures = 1
        run("push", str(labels), "hf://datasets/user/labels")
        assert hub.private == {"user/labels": True}
        assert len(hub.commits) == 4
        assert hub.commits[-1][1] == sorted(path.name for path in labels.glob("shard-*.json"))
        run("push", str(labels), "hf://datasets/user/labels")
        assert len(hub.commits) == 4
        run("pull", "hf://datasets/user/labels", str(tmp_path / "back"))
    assert content(tmp_path / "back") == content(labels)
