"""Random damage to what users may be given: `python -m scripts.fuzz TARGET [--minutes 5] [--seed 0]`.

    store       a label store: its shard, plan and marker mutated, digests repaired; opened, read whole, verified
    recipe      the text of a recipe
    image-list  the text of a list of images
    checkpoint  a training checkpoint, digests repaired, and a published file with code in it, which must not run

Only the project's own errors may come out, and each try must end within its limit. What comes out otherwise is kept,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from labeler.base.errors import TokenLabelError
from labeler.base.whole_files import read_sealed, sealed

TESTS = Path(__file__).parents[1] / "tests"
LIMIT = 60.0  # seconds for one try
NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def mutated(data: bytes, rng: np.random.Generator, words: tuple[bytes, ...] = (), most: int = 8) -> bytes:
    """`data` with one to `most` changes: bits, bytes, numbers, pieces moved, doubled, cut, or a word put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, most + 1))):
        place = int(rng.integers(0, len(out) + 1))
        length = int(min(2 ** rng.integers(0, 9), max(1, len(out) // 4)))
        kind = int(rng.integers(0, 8))
        if kind == 0 and place < len(out):
            out[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and place < len(out):
            out[place] = int(rng.choice(INTERESTING))
        elif kind == 2:
            out[place : place + 8] = NUMBERS[int(rng.integers(len(NUMBERS)))].to_bytes(8, "little")
        elif kind == 3:
            out[place : place + length] = rng.bytes(length)
        elif kind == 4:
            del out[place : place + length]
        elif kind == 5:
            other = int(rng.integers(0, len(out) + 1))
            out[place:place] = out[other : other + length]
        elif kind == 6 and words:
            out[place:place] = words[int(rng.integers(len(words)))]
        elif kind == 7:
            other = int(rng.integers(0, len(out) + 1))
            out[place : place + length] = out[other : other + length]
    return bytes(out)


class Target(Protocol):
    """Something that reads files. `run_one` returns what came of one mutation, and raises what should never come."""

    last: tuple[str, bytes]  # name and content of the file that was tried

    def run_one(self) -> str: ...


class StoreTarget:
    """A store of a few rows, mutated in place; a child process opens it first (`labeler.store.foreign_store`)."""

    def __init__(self, store: Path, rng: np.random.Generator) -> None:
        self.rng, self.store, self.last = rng, store, ("", b"")
        self.clean = {path.name: path.read_bytes() for path in store.iterdir()}
        self.shard = min(name for name in self.clean if name.startswith("shard-") and name.endswith(".h5"))
        self.records = sorted(name for name in self.clean if name.endswith(".json"))
        self.structures = hdf5_structures(self.clean[self.shard])

    def run_one(self) -> str:
        from labeler.checks.verify import verify_store
        from labeler.store.label_store import LabelStore

        name, data = self.last = self._input()
        try:
            (self.store / name).write_bytes(data)
            if name.endswith(".h5"):
                marker = self.store / f"{name.split('.')[0]}.json"
                record = {**read_sealed(marker), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                marker.write_bytes(sealed(record))
            try:
                labels = LabelStore(self.store)
                labels.read(np.arange(len(labels)))
                _ = labels.keys, labels.quarantine, labels.column("target"), labels.fingerprint
                if self.rng.random() < 0.1:
                    verify_store(self.store)
            except TokenLabelError as error:
                refusal = "crashed" if "a crash of" in str(error) else "refused"
                return f"{refusal}: {name.rpartition('.')[2]}"
            return f"read: {name.rpartition('.')[2]}"
        finally:
            for other, content in self.clean.items():
                if other == name or other.endswith(".json"):
                    (self.store / other).write_bytes(content)

    def _input(self) -> tuple[str, bytes]:
        if self.rng.random() < 0.75:
            if self.rng.random() < 0.2:
                return self.shard, mutated(self.clean[self.shard], self.rng)
            return self.shard, self._with_mutated_structure(self.clean[self.shard], self.structures)
        name = self.records[int(self.rng.integers(len(self.records)))]
        if self.rng.random() < 0.2:
            return name, mutated(self.clean[name], self.rng)
        record = json.loads(self.clean[name])
        del record["xxh3"]
        return name, resealed(mutated_record(record, self.rng))

    def _with_mutated_structure(self, data: bytes, structures: list[tuple[int, int]]) -> bytes:
        """Some bytes of HDF5's own structures changed, and their checksums made to fit."""
        out = bytearray(data)
        for _ in range(int(self.rng.integers(1, 4))):
            start, end = structures[int(self.rng.integers(len(structures)))]
            place, kind = int(self.rng.integers(start + 4, end)), self.rng.random()
            if kind < 0.4:
                out[place] ^= 1 << int(self.rng.integers(0, 8))
            elif kind < 0.8:
                out[place] = int(self.rng.integers(0, 256))
            else:
                number = NUMBERS[int(self.rng.integers(len(NUMBERS)))].to_bytes(8, "little")
                out[place : min(place + 8, end)] = number[: max(0, end - place)]
            out[end : end + 4] = lookup3(bytes(out[start:end])).to_bytes(4, "little")
        return bytes(out)


def hdf5_structures(data: bytes) -> list[tuple[int, int]]:
    """(start, place of the checksum) of the structures of an HDF5 file that carry one."""
    found = []
    for word in (b"\x89HDF", b"OHDR", b"OCHK", b"FAHD", b"FADB", b"FRHP", b"FHDB", b"BTHD", b"BTLF"):
        start = data.find(word)
        while start >= 0:
            ends = range(start + 12, min(start + 1500, len(data) - 3))
            end = next((e for e in ends if lookup3(data[start:e]) == int.from_bytes(data[e : e + 4], "little")), None)
            if end is not None:
                found.append((start, end))
            start = data.find(word, start + 1)
    return found


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash, which HDF5 puts behind its structures."""
    mask = 0xFFFFFFFF

    def turned(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    for place in range(0, len(data), 12):
        part = data[place : place + 12].ljust(12, b"\0")
        a = (a + int.from_bytes(part[:4], "little")) & mask
        b = (b + int.from_bytes(part[4:8], "little")) & mask
        c = (c + int.from_bytes(part[8:], "little")) & mask
        if place + 12 >= len(data):
            break
        for bits in ((4, 6, 8), (16, 19, 4)):
            a, c = ((a - c) & mask) ^ turned(c, bits[0]), (c + b) & mask
            b, a = ((b - a) & mask) ^ turned(a, bits[1]), (a + c) & mask
            c, b = ((c - b) & mask) ^ turned(b, bits[2]), (b + a) & mask
    c = ((c ^ b) - turned(b, 14)) & mask
    a = ((a ^ c) - turned(c, 11)) & mask
    b = ((b ^ a) - turned(a, 25)) & mask
    c = ((c ^ b) - turned(b, 16)) & mask
    a = ((a ^ c) - turned(c, 4)) & mask
    b = ((b ^ a) - turned(a, 14)) & mask
    return ((c ^ b) - turned(b, 24)) & mask


def resealed(record: Any) -> bytes:
    """As `sealed`, also for what UTF-8 cannot hold."""
    try:
        return sealed(record)
    except (UnicodeEncodeError, TypeError):
        return json.dumps(record).encode()


def mutated_record(record: Any, rng: np.random.Generator) -> Any:
    """A JSON object with one value, anywhere in it, replaced by another."""
    values: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../x"]
    values += ["\0", "\ud800", "9" * 100, [], [[]], {}, {"key": 1}]
    record = json.loads(json.dumps(record))
    for _ in range(int(rng.integers(1, 3))):
        holder: Any = record
        while True:
            places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not places:
                break
            place = places[int(rng.integers(len(places)))]
            if isinstance(holder[place], (dict, list)) and holder[place] and rng.random() < 0.7:
                holder = holder[place]
                continue
            if rng.random() < 0.15:
                del holder[place]
            else:
                # A copy: the same list twice could come to hold itself.
                holder[place] = copy.deepcopy(values[int(rng.integers(len(values)))])
            break
    return record


class RecipeTarget:
    """The text of the packaged recipes, and overrides."""

    WORDS = (b"[run]", b"[model.args]", b"=", b'"', b"\"\"\"", b"1e-3", b"inf", b"nan", b"1979-05-27", b"\xff",
             b"[", b"{", b"true", b"0x7fffffffffffffffff", b"-1", b"\n", b".", b"a.b = 1\n", b"\0")  # fmt: skip

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        from train.recipes.recipe import recipe_names, recipe_path

        self.rng, self.path, self.last = rng, folder / "recipe.toml", ("", b"")
        self.seeds = [recipe_path(name).read_bytes() for name in recipe_names()]

    def run_one(self) -> str:
        from train.recipes.recipe import load_recipe, to_toml

        data = self.seeds[int(self.rng.integers(len(self.seeds)))]
        if self.rng.random() < 0.5:
            return self._values(mutated_record(tomllib.loads(data.decode()), self.rng))
        data = mutated(data, self.rng, self.WORDS)
        override = mutated(b"optimizer.lr=1e-3", self.rng, self.WORDS).decode("utf-8", "surrogateescape")
        self.last = ("recipe.toml", data + b"\n# " + ascii(override).encode())
        self.path.write_bytes(data)
        try:
            config = load_recipe(self.path, [override] if self.rng.random() < 0.3 else [])
        except TokenLabelError as error:
            if len(str(error)) > 2000:
                raise AssertionError("an error that nobody reads") from error
            return "refused"
        self.path.write_text(to_toml(config), encoding="utf-8")
        assert load_recipe(self.path) == config, "a recipe that was written reads otherwise"
        return "read"

    def _values(self, values: Any) -> str:
        """As `run_one`, past TOML."""
        from train.recipes.recipe import parse_config

        self.last = ("values.json", json.dumps(values).encode())
        try:
            parse_config(values, "a recipe")
        except TokenLabelError:
            return "values refused"
        return "values read"


class ImageListTarget:
    """Image lists: every resulting key must be a file below the root."""

    WORDS = (b"../", b"/etc/passwd", b"\0", b"\\", b"//", b"./", b"\n", b"\r\n", b"\xff", b"\xe2\x80\xa8",
             b"class0/img000.jpg", b"CLASS0/IMG000.JPG", b"out/secret.jpg", b" ", b"\xc2\x85", b"A" * 300)  # fmt: skip

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        from tiny import make_images

        self.rng, self.last, self.list = rng, ("", b""), folder / "list.txt"
        self.root = make_images(folder / "images", 6)
        (folder / "secret.jpg").write_bytes(b"secret")
        (self.root / "out").symlink_to(folder)
        self.seed = "\n".join(p.relative_to(self.root).as_posix() for p in sorted(self.root.glob("class*/*"))).encode()

    def run_one(self) -> str:
        from labeler.sources.folder_source import find_images
        from labeler.sources.image_list import image_path

        lines = [line for line in self.seed.split(b"\n") if self.rng.random() < 0.8]
        self.rng.shuffle(lines)
        data = mutated(b"\n".join(lines), self.rng, self.WORDS, 2)
        self.last = ("list.txt", data)
        self.list.write_bytes(data)
        try:
            found = find_images(self.root, self.list)
        except TokenLabelError:
            return "refused"
        inside = os.path.realpath(self.root)
        for key in found.keys:
            path = os.path.realpath(image_path(self.root, key))
            assert path.startswith(inside + os.sep), key
            assert os.path.isfile(path), key
        assert len({key.casefold() for key in found.keys}) == len(found.keys)
        return "read"


class CheckpointTarget:
    """A training checkpoint with repaired digests, and published files, some of which contain code."""

    WORDS = (b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"R", b"b", b"\x81", b"\x93", b"(",
             b"t", b"]", b"}", b"u", b"Q", b"\x8a\x08\0\0\0\0\0\0\0\x10", b"ccollections\nOrderedDict\n", b"q\0",
             b"h\0", b".", b"ctorch._utils\n_rebuild_tensor_v2\n")  # fmt: skip

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        from hostile import Canary, training_checkpoint

        self.rng, self.last, self.canary = rng, ("", b""), folder / "canary"
        self.folder = training_checkpoint(folder)
        self.clean = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.published = folder / "published.pth"
        self.seeds = [_saved({"model": _weights()}), _saved({"model": _weights(), "x": Canary(self.canary)}),
                      _saved(_weights(), zipped=False), pickle.dumps({"x": Canary(self.canary)}, 2)]  # fmt: skip

    def run_one(self) -> str:
        found = self._published() if self.rng.random() < 0.5 else self._training()
        assert not self.canary.exists(), "code in a file was run"
        return found

    def _published(self) -> str:
        from labeler.base.errors import ModelError
        from labeler.teacher.weights import read_checkpoint
        from model.checkpoints import load_reference_checkpoint

        data = self._mutated(self.seeds[int(self.rng.integers(len(self.seeds)))])
        self.last = ("published.pth", data)
        self.published.write_bytes(data)
        try:
            read_checkpoint(str(self.published))
            found = "read: published"
        except TokenLabelError:
            found = "refused: published"
        with suppress(ModelError):
            load_reference_checkpoint(self.published)
        return found

    def _training(self) -> str:
        from train.network import restore_network
        from train.record.checkpoint import read_state, read_weights
        from train.record.checkpoint_folders import find_checkpoint

        names = sorted(self.clean)
        name = names[int(self.rng.integers(len(names)))]
        if name == "checkpoint.json" and self.rng.random() < 0.8:
            record = json.loads(self.clean[name])
            del record["xxh3"]
            data = resealed(mutated_record(record, self.rng))
        else:
            data = self._mutated(self.clean[name])
        self.last = (name, data)
        try:
            (self.folder / name).write_bytes(data)
            if name != "checkpoint.json":
                record = read_sealed(self.folder / "checkpoint.json")
                record["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (self.folder / "checkpoint.json").write_bytes(sealed(record))
            folder, info = find_checkpoint(self.folder)
            read_state(folder, info)
            restore_network(info, read_weights(folder, info, ema=bool(self.rng.random() < 0.5)))
            return f"read: {name}"
        except TokenLabelError:
            return f"refused: {name}"
        finally:
            for other, content in self.clean.items():
                (self.folder / other).write_bytes(content)

    def _mutated(self, data: bytes) -> bytes:
        """Mutate mostly the pickle of an archive, and repair the archive's own checksums."""
        if not zipfile.is_zipfile(io.BytesIO(data)):
            # The header of a safetensors file is where damage has meaning.
            head = min(len(data), 2000)
            return mutated(data[:head], self.rng, self.WORDS) + data[head:]
        if self.rng.random() < 0.2:
            return mutated(data, self.rng)
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = mutated(content, self.rng, self.WORDS)
                new.writestr(entry.filename, content)
        return out.getvalue()


def _weights() -> dict[str, Any]:
    import torch

    return {
        "head.weight": torch.ones(3, 4),
        "pos_embed": torch.zeros(1, 5, 4),
        "layers.0.mixer.A_log": torch.zeros(8, 4),
    }


def _saved(content: Any, zipped: bool = True) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def make_target(name: str, folder: Path, rng: np.random.Generator) -> Target:
    """The target with its seeds, made in `folder`."""
    sys.path.insert(0, str(TESTS))
    if name == "store":
        from tiny import make_images

        from labeler import LabelerConfig, TeacherConfig, label_images

        settings = LabelerConfig(
            TeacherConfig("tiny:colour_teacher"), shard_size=4, decoder="pil", threads=1, progress=False
        )
        label_images(make_images(folder / "images", 8), folder / "store", settings)
        os.environ["XDG_STATE_HOME"] = os.devnull  # nothing is remembered: every try goes through the child
        return StoreTarget(folder / "store", rng)
    kinds: dict[str, Any] = {"recipe": RecipeTarget, "image-list": ImageListTarget, "checkpoint": CheckpointTarget}
    return kinds[name](folder, rng)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"a try of more than {LIMIT:.0f} s")


def fuzz(name: str, minutes: float, seed: int, kept: Path) -> int:
    """Fuzz for some time. Returns how many inputs caused unexpected errors; these are written to `kept`."""
    wrong, tries, seen = 0, 0, Counter[str]()
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        target = make_target(name, Path(folder), np.random.default_rng(seed))
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            try:
                seen[target.run_one()] += 1
            except Exception as error:  # anything that is not the project's own
                wrong += 1
                place = kept / f"{name}-{seed}-{tries}"
                place.mkdir(parents=True, exist_ok=True)
                (place / target.last[0]).write_bytes(target.last[1])
                (place / "trace.txt").write_text(traceback.format_exc(), errors="backslashreplace")
                print(f"{place}: {ascii(error)[:200]}", file=sys.stderr)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            tries += 1
        rate = tries / (time.monotonic() - began)
    counts = ", ".join(f"{count:,} {what}" for what, count in sorted(seen.items()))
    print(f"{name}: {tries:,} tries, {rate:,.1f} a second; {counts}; {wrong} went wrong")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", choices=("store", "recipe", "image-list", "checkpoint"))
    parser.add_argument("--minutes", type=float, default=5, help="how long to run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/fuzz"), help="folder for inputs that cause unexpected errors"
    )
    options = parser.parse_args(arguments)
    return int(fuzz(options.target, options.minutes, options.seed, options.kept) > 0)


if __name__ == "__main__":
    sys.exit(main())
