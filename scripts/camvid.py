"""CamVid with several networks, from scratch and from a backbone that was trained with token labels.

    python -m scripts.camvid --data camvid.zip --weights demansia=RUN vim=RUN --seeds 0 1 2 --jobs 2

The archive holds `train`, `val` and `test`, each with `images/NAME.jpg` and `masks/NAME.png`. Every network trains by
the recipe `camvid` and is scored on the images of `test`. Run again, it keeps what is done and goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train.__main__
from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from scripts.cifar10 import command
from scripts.evidence.render import fill
from scripts.evidence.statistics import mean_and_error

TABLE = "camvid"
NETWORKS = {
    "resnet": ("ResNet-10-T", "model.name=resnet10t model.args={}"),
    "demansia": ("DeMansia Pico, pyramid", "model.name=demansia_pico_sfp"),
    "vim": ("Vim Pico, pyramid", "model.name=vim_pico_sfp"),
    "lvvit": (
        "LV-ViT, 128 wide, 6 layers, pyramid",
        "model.name=lvvit_t_sfp model.args={embed_dim=128,depth=6,num_heads=2}",
    ),
}


@dataclass(frozen=True)
class Arm:
    """One training: a network, from scratch or from weights, with one seed."""

    network: str
    weights: str | None
    seed: int
    steps: int | None
    out: Path

    @property
    def folder(self) -> Path:
        begun = "scratch" if self.weights is None else "token-labels"
        return self.out / f"{self.network}-{begun}-{self.seed}"


def unpack(archive: Path, out: Path) -> Path:
    """Unpacks the archive, unless that is done. Raises InputError if it is not CamVid."""
    folder = out / "images"
    if not folder.exists():
        try:
            with zipfile.ZipFile(archive) as file:
                if not {"train/images/", "test/masks/"} <= {"/".join(n.split("/")[:2]) + "/" for n in file.namelist()}:
                    raise InputError(f"{archive} is not the archive of CamVid", expected="train/images, test/masks …")
                file.extractall(out / "images.tmp")
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{archive} cannot be unpacked", got=error) from None
        (out / "images.tmp").rename(folder)
    return folder


def train_arm(arm: Arm, images: Path) -> dict[str, Any]:
    """Trains one network and scores it on `test`. Returns its result, which it also writes to its folder."""
    done = arm.folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    settings = [
        *(f"data.{name}={images / split / 'images'}" for name, split in (("images", "train"), ("validation", "test"))),
        f"segmentation.masks={images / 'train' / 'masks'}",
        f"segmentation.validation_masks={images / 'test' / 'masks'}",
        f"run.out={arm.folder}",
        f"run.seed={arm.seed}",
        *([] if arm.weights is None else [f"model.weights={arm.weights}"]),
        *([] if arm.steps is None else [f"schedule.steps={arm.steps}"]),
        *NETWORKS[arm.network][1].split(),
        *("run.eval_every=1000", "run.threads=1", "data.threads=1", "run.progress=false"),
    ]
    summary = command(train.__main__, ["fit", "camvid", *settings, "--resume", "auto", "--json"])
    last = [json.loads(line) for line in (arm.folder / "metrics.jsonl").read_text().splitlines()][-1]
    found = {
        "network": arm.network,
        "weights": arm.weights is not None,
        "seed": arm.seed,
        "steps": summary["steps"],
        "miou": summary["top1"],
        "pixel_accuracy": last["pixel_accuracy"],
        "seconds": round(summary["seconds"]),
    }
    replace_file(done, json.dumps(found).encode() + b"\n")
    return found


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = ["| network | begins | seeds | mean IoU | pixel accuracy | s a run |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for one in sorted(results, key=lambda one: (list(NETWORKS).index(one["network"]), one["weights"], one["seed"])):
        groups.setdefault((one["network"], one["weights"]), []).append(one)
    for (network, weights), ones in groups.items():
        cells = []
        for key in ("miou", "pixel_accuracy"):
            mean, error = mean_and_error([one[key] for one in ones])
            cells.append(f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if len(ones) > 1 else "") + " %")
        begun = "from token labels" if weights else "from scratch"
        seconds = round(sum(one["seconds"] for one in ones) / len(ones))
        lines.append(f"| {NETWORKS[network][0]} | {begun} | {len(ones)} | {cells[0]} | {cells[1]} | {seconds} |")
    steps = ", ".join(str(count) for count in sorted({one["steps"] for one in results}))
    return "\n".join([*lines, "", f"{steps} steps of 8 images, one thread each."])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scripts.camvid", description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".zip file of train, val and test")
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"), help="folder of the runs (%(default)s)")
    parser.add_argument("--networks", choices=NETWORKS, nargs="*", default=list(NETWORKS), help="from scratch")
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="NETWORK=RUN", help="begin from these backbones, too"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds (%(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a run (default: the recipe's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with one thread each (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/evidence/camvid.json"), help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/dense.md"), help="page to write to (%(default)s)")
    options = parser.parse_args(arguments)
    begun: list[tuple[str, str | None]] = [(name, None) for name in options.networks]
    begun += [(name, run) for name, _, run in (text.partition("=") for text in options.weights)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        images = unpack(options.data, options.out)
    except InputError as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    arms = [Arm(name, run, seed, options.steps, options.out) for seed in options.seeds for name, run in begun]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for done in as_completed([pool.submit(train_arm, arm, images) for arm in arms]):
            print(done.result(), file=sys.stderr, flush=True)
    # Those of earlier calls, too.
    results = [json.loads(path.read_text()) for path in sorted(options.out.glob("*/result.json"))]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.results, json.dumps(results, indent=1).encode() + b"\n")
    fill(options.page, TABLE, markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
