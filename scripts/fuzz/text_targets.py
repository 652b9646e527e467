"""The texts of recipes and of lists of images."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import TokenLabelError
from scripts.fuzz.mutation import mutated, mutated_record


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
