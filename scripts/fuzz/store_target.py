"""A label store: its shard, plan and marker mutated, digests repaired; opened, read whole, verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from labeler.base.errors import TokenLabelError
from labeler.base.whole_files import read_sealed, sealed
from scripts.fuzz.hdf5_structures import hdf5_structures, lookup3
from scripts.fuzz.mutation import NUMBERS, mutated, mutated_record, resealed


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
