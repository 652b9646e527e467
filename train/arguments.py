"""The options of every command of `python -m train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeler.base.command_line import Run, add_command, at_least
from labeler.remote.urls import path_or_url

PICTURES_HELP = "folder for the pictures of --map, or for the masks of a segmentation run (predictions)"
PICTURES, EXPLAINED = Path("predictions"), Path("explained")
EMA = "use the averaged weights, or not (default: the better ones, if the checkpoint records both accuracies)"
PREDICT = "classify images, and with --map their tokens; unreadable images are reported, and the exit status is 3"
EXPLAIN = "show what a network does inside with images: gates, step sizes, reach and token classes of each layer"
EXPORT = "write a network as one file for ONNX, torch.export or ExecuTorch, and compare it with the run on images"
CSV = "also write a table with timm's columns: filename, and index, label, prob (_0, _1 … if N > 1)"
BACKENDS = ("auto", "dali", "cpu", "pil")


def _add_fit(commands: Any, run: Run) -> None:
    fit = add_command(commands, "fit", run, "train a model by a recipe; under torchrun with several ranks")
    fit.add_argument("recipe", help="a .toml file, or a name from `python -m train recipes`")
    fit.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings that replace the recipe's; all of them are listed below",
    )
    fit.add_argument("--resume", metavar="auto|PATH", help="continue from the run's newest checkpoint, or from PATH")
    fit.add_argument(
        "--ranks", type=at_least(1), metavar="N", help="start N processes on this machine, one for each GPU"
    )
    plain_help = fit.format_help
    fit.format_help = lambda: f"{plain_help()}\n{_all_settings()}"  # type: ignore[method-assign]


def _add_validate(commands: Any, run: Run) -> None:
    validate = add_command(commands, "validate", run, "measure top-1 and top-5 accuracy on images")
    validate.add_argument("checkpoint", type=Path, help="a run's folder, one of its checkpoints, or a published file")
    validate.add_argument(
        "--images", type=path_or_url, required=True, help="images in class folders, or with labels; any with --real"
    )
    validate.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    validate.add_argument(
        "--real", type=Path, metavar="real.json", help="use ImageNet-ReaL labels instead of the class folders"
    )
    validate.add_argument("--batch-size", type=int, default=64, help="images at a time, per rank (%(default)s)")
    validate.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="library that decodes and resizes; pil: as timm does, bit for bit",
    )
    validate.add_argument("--device", default="auto", help="cpu, cuda or auto")
    validate.add_argument("--per-class", action="store_true", help="also print each class's accuracy, the worst first")
    validate.add_argument(
        "--confusions", type=at_least(1), default=0, metavar="N", help="also print the N most frequent confusions"
    )
    validate.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="masks of the images: mean IoU and pixel accuracy of a segmentation run",
    )
    text = "write the results to a file; .json: everything; .csv: one line per class"
    validate.add_argument("--out", type=Path, metavar="FILE", help=text)
    text = "write the confusion matrix: one line per true class, one column per prediction"
    validate.add_argument("--matrix", type=Path, metavar="FILE.csv", help=text)
    _add_input(validate)


def _add_predict(commands: Any, run: Run) -> None:
    predict = add_command(commands, "predict", run, PREDICT, "print one JSON object per line, for each image")
    predict.add_argument("checkpoint", type=Path, help="as for validate")
    predict.add_argument(
        "images",
        nargs="+",
        metavar="PATH",
        help="an image, a folder, a list, .tar or .parquet files, or - for paths on standard input, one per line",
    )
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes to print per image (%(default)s)")
    predict.add_argument("--csv", type=Path, metavar="FILE", help=CSV)
    predict.add_argument(
        "--batch-size", type=at_least(1), default=32, metavar="B", help="images at a time (%(default)s)"
    )
    predict.add_argument("--map", action="store_true", help="draw the auxiliary head's class of each token")
    predict.add_argument("--out", type=Path, metavar="DIR", help=PICTURES_HELP)
    predict.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    predict.add_argument("--device", default="auto", help="cpu, cuda or auto")
    _add_input(predict)


def _add_explain(commands: Any, run: Run) -> None:
    text = "print one JSON object per line, for each image, with the numbers of each layer"
    explain = add_command(commands, "explain", run, EXPLAIN, text)
    explain.add_argument("checkpoint", type=Path, help="as for validate; a DeMansia, Vim, MILA or MambaVision network")
    explain.add_argument("images", nargs="+", metavar="PATH", help="as for predict")
    text = f"folder for a page per image, with its pictures beside it; for one image also a name.html ({EXPLAINED})"
    explain.add_argument("--out", type=Path, default=EXPLAINED, metavar="DIR", help=text)
    explain.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    explain.add_argument("--device", default="auto", help="cpu, cuda or auto")
    _add_input(explain)


def _add_export(commands: Any, run: Run) -> None:
    export = add_command(commands, "export", run, EXPORT)
    export.add_argument("checkpoint", type=Path, help="as for validate")
    export.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="real images to compare on, as for predict"
    )
    export.add_argument(
        "--format", choices=("onnx", "torch-export", "executorch"), default="onnx", help="(%(default)s)"
    )
    text = "weights in int8, ONNX only; ranges of activations measured at each run, or on images before"
    export.add_argument("--int8", choices=("dynamic", "static"), help=text)
    export.add_argument("--out", type=Path, metavar="FILE", help="default: named after the run, in the working folder")
    text = "how many of the images to compare on, and how many others to measure ranges on (%(default)s)"
    export.add_argument("--count", type=at_least(1), default=64, metavar="N", help=text)
    export.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    _add_input(export)


def _add_doctor(commands: Any, run: Run) -> None:
    text = "show which parts of this machine can be used, and why others cannot"
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.set_defaults(run=run)
    doctor.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_recipes(commands: Any, run: Run) -> None:
    text = "list the packaged recipes, or all settings of one with their defaults and meanings"
    recipes = commands.add_parser("recipes", help=text, description=text)
    recipes.set_defaults(run=run)
    recipes.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a packaged recipe, or a .toml file")
    recipes.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--img-size", type=at_least(1), metavar="N", help="side of the input in pixels (default: as in training)"
    )
    command.add_argument(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help="the crop's share of the image's shorter side (default: as in training)",
    )


def _all_settings() -> str:
    from train.recipes.listing import listing

    return f"settings (the section may be omitted if only one has the key; key=none unsets)\n\n{listing()}"


ADDED: dict[str, Callable[[Any, Run], None]] = {
    "fit": _add_fit,
    "validate": _add_validate,
    "predict": _add_predict,
    "explain": _add_explain,
    "export": _add_export,
    "doctor": _add_doctor,
    "recipes": _add_recipes,
}
