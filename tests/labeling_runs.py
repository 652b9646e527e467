"""Labeling runs that a test starts, disturbs and compares; and teachers that fail, or wait, on purpose."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from faults import tally
from PIL import Image
from tiny import ColourTeacher
from torch import nn

from labeler import LabelStore

TESTS = Path(__file__).parent
PATIENCE = 120  # seconds until a process counts as one that hangs


def content(store: Path) -> list[tuple[np.ndarray, ...]]:
    """Everything that a store holds, decoded, shard by shard."""
    labels = LabelStore(store)
    shards = [labels.read_shard(i) for i in range(labels.meta.shards)]
    return [
        (
            s.scores,
            s.background,
            s.classes,
            s.tail_classes,
            s.tail_offsets,
            s.region,
            s.image_size,
            s.target,
            s.image_digest,
            s.keys,
        )
        for s in shards
    ]


def equal(a: Path, b: Path) -> bool:
    pairs = zip(content(a), content(b), strict=True)
    return all(np.array_equal(x, y) for left, right in pairs for x, y in zip(left, right, strict=True))


def state(store: Path, pattern: str = "shard-*") -> dict[str, tuple[int, int]]:
    """Identity of every shard's file and marker: replaced or rewritten ones would differ."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in store.glob(pattern)}


def assert_undisturbed(row: int, store: Path, undisturbed: Path, **seen: int) -> None:
    """The store holds, bit for bit, what an undisturbed run's does, and nothing else; tells the row's tally."""
    files = {p.name: p.read_bytes() for p in undisturbed.glob("shard-*.h5")}
    keys, expected = LabelStore(store).keys, LabelStore(undisturbed).keys
    found = {p.name: p.read_bytes() for p in store.glob("shard-*.h5")}
    tally(
        row,
        lost=len(set(expected) - set(keys)),
        doubled=len(keys) - len(set(keys)),
        shards=len(files),
        shards_identical=sum(found.get(name) == data for name, data in files.items()),
        **seen,
    )
    assert keys == expected
    assert found == files
    assert equal(store, undisturbed)
    assert sorted(p.name for p in store.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def command(images: Path, store: Path, *more: str, teacher: str = "tiny:colour_teacher") -> list[str]:
    return [sys.executable, "-m", "labeler", *arguments(images, store, *more, teacher=teacher)]


def arguments(images: Path, store: Path, *more: str, teacher: str = "tiny:colour_teacher") -> list[str]:
    fine = ["--levels", "160", "--threshold", "1e-6"]  # as conftest's `config`
    options = [
        *fine,
        "--teacher",
        teacher,
        "--shard-size",
        "4",
        "--batch-size",
        "2",
        "--decoder",
        "pil",
        "--threads",
        "1",
    ]
    return ["label", str(images), "--store", str(store), "--quiet", *options, *more]


def start(arguments: list[str], **options: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        arguments, env=env, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def in_child(work: Callable[[], object]) -> BaseProcess:
    """`work` in a real process that can be killed, without the seconds that importing torch takes."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def in_own_process(errors: Path, work: Callable[[], object]) -> tuple[int, str]:
    """Exit status of `work` in a child, which may limit itself or mount what it likes, and what it wrote as errors."""

    def silenced() -> None:
        with (
            open(errors, "a", buffering=1, encoding="utf-8") as sys.stdout,
            open(errors, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as sys.stderr,
        ):
            sys.exit(work())

    child = in_child(silenced)
    child.join(PATIENCE)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode, errors.read_text()


def wait_for_markers(store: Path, count: int, alive: Callable[[], bool]) -> None:
    """Until so many shards are committed, or the process has ended."""
    wait_until(lambda: not alive() or len(list(store.glob("shard-*.json"))) >= count)


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


CALLS = ("open", "write", "fsync", "close", "rename", "link", "unlink")


class Watched:
    """The system calls that a commit makes, in order; `before(number, name, arguments)` is called before each.

    `log` is (name, arguments) of each call that was let through. Not thread-safe; leaves `os` as it was on exit.
    """

    def __init__(self, before: Callable[[int, str, tuple], None] = lambda *_: None) -> None:
        self.before, self.log, self.real = before, [], {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> Watched:
        for name in CALLS:
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def _watched(self, name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            self.before(len(self.log), name, arguments)
            self.log.append((name, arguments))
            return self.real[name](*arguments, **options)

        return call


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def red_image(path: Path) -> Path:
    Image.new("RGB", (48, 40), (255, 0, 0)).save(path, quality=95)
    return path


def is_red(images: torch.Tensor) -> bool:
    """Whether a normalised batch [B, 3, H, W] has an image of `red_image` in it."""
    red = (images[:, 0] > 0.9) & (images[:, 1] < -0.9) & (images[:, 2] < -0.9)
    return bool((red.float().mean((1, 2)) > 0.9).any())


class Held(ColourTeacher):
    """Over a red image it writes its pid into `folder` and waits until the file `folder`/open is there."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        if is_red(images):
            (self.folder / f"{os.getpid()}.held").touch()
            while not (self.folder / "open").exists():
                time.sleep(0.005)
        return super().score_maps(images)


def held_teacher(folder: Path) -> str:
    """The name of a teacher that is held in `folder`; its module has a name of its own, for it is imported here too."""
    folder.mkdir()
    name = f"held_{secrets.token_hex(4)}"
    (folder / f"{name}.py").write_text(
        f"from labeling_runs import Held\n\n\ndef teacher():\n    return Held({str(folder)!r})\n"
    )
    return f"{name}:teacher"


def held_worker(folder: Path, but: set[int]) -> int:
    """The pid of a worker that waits over the red image, once there is one that is not among `but`."""

    def found() -> set[int]:
        return {int(p.stem) for p in folder.glob("*.held")} - but

    wait_until(found)
    return found().pop()


class OutOfMemory(ColourTeacher):
    """What numpy or torch raise when they get no memory."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        if is_red(images):
            raise MemoryError("Unable to allocate 4.00 TiB")
        return super().score_maps(images)


def out_of_memory() -> nn.Module:
    return OutOfMemory()


class KilledForItsMemory(ColourTeacher):
    """What the kernel does to a process that takes too much."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        if is_red(images):
            kill_myself()
        return super().score_maps(images)


def killed_for_its_memory() -> nn.Module:
    return KilledForItsMemory()


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of everything that runs."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found[int(folder.name)] = parent, (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
    return found


def descendants(pid: int) -> dict[int, str]:
    everything, below, grown = processes(), {pid}, True
    while grown:
        more = {p for p, (parent, _) in everything.items() if parent in below} - below
        below, grown = below | more, bool(more)
    return {p: everything[p][1] for p in below if p in everything}


def workers_below(pid: int) -> list[int]:
    """The Ray actors that label, among the descendants of a process."""
    return [child for child, line in descendants(pid).items() if line.startswith("ray::_Worker")]
