"""The learning rates of the packaged recipes as one picture, docs/schedules.png.

python -m scripts.documentation.draw_schedules
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.recipes.recipe import load_recipe, recipe_names
from train.record.curves import draw_schedules

# Of the demo's 2,000 images in batches of 32; the shape of longer schedules does not depend on it.
EPOCH_STEPS = 62


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "schedules.png")
    out = parser.parse_args().out
    draw_schedules({name: load_recipe(name) for name in recipe_names()}, out, EPOCH_STEPS)
    print(out)


if __name__ == "__main__":
    main()
