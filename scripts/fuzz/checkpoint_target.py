"""A training checkpoint, digests repaired, and published files with code in them, which must not run."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import TokenLabelError
from labeler.base.whole_files import read_sealed, sealed
from scripts.fuzz.mutation import mutated, mutated_record, resealed


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
