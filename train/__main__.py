"""The command line: `python -m train fit | validate | predict | explain | export | doctor | recipes`.

Exit status: 0 all done; 1 the run failed half-way (`--resume auto` continues it); 2 bad input or usage; 3 done, but
some images were left out; 4 stored data or a checkpoint is damaged; 130 interrupted before training starts,
or in another command; 143 stopped by a signal, with everything saved.
"""

from __future__ import annotations

try:
    from labeler.base.signals import end_at_interrupt
except ImportError:
    import sys

    import labeler

    print(f"error: {labeler.__file__} hides a package of ours. Use `token-labeling COMMAND` instead.", file=sys.stderr)
    raise SystemExit(2) from None

if __name__ == "__main__":
    end_at_interrupt()  # before the imports, which take seconds; `fit` sets handlers of its own

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labeler.base.command_line import OneLineParser, add_command, at_least, parser_of_command, program, run_command
from labeler.base.errors import InputError
from labeler.remote.urls import path_or_url
from train.ranks.rank_errors import first_rank_first

PICTURES_HELP = "folder for the pictures of --map, or for the masks of a segmentation run (predictions)"
PICTURES, EXPLAINED = Path("predictions"), Path("explained")
LEFT_OUT = 3
EMA = "use the averaged weights, or not (default: the better ones, if the checkpoint records both accuracies)"
PREDICT = "classify images, and with --map their tokens; unreadable images are reported, and the exit status is 3"
EXPLAIN = "show what a network does inside with images: gates, step sizes, reach and token classes of each layer"
EXPORT = "write a network as one file for ONNX, torch.export or ExecuTorch, and compare it with the run on images"
CSV = "also write a table with timm's columns: filename, and index, label, prob (_0, _1 … if N > 1)"
BACKENDS = ("auto", "dali", "cpu", "pil")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _options(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    options.run = first_rank_first(options.run)
    return run_command(options, extra="train")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, for completion and documentation."""
    return parser_of_command(_parser(), command)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; argparse alone does not accept overrides after a flag."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "fit":
        options.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_as_override(options.command, rest[0])}")
    return options


def _as_override(command: str, flag: str) -> str:
    """A hint for a flag of other programs that is a setting here."""
    from train.recipes.config import SECTIONS

    key = flag.lstrip("-").partition("=")[0].replace("-", "_")
    known = command == "fit" and any(key in section.model_fields for section in SECTIONS.values())
    return f". Settings are given as {key}=VALUE, without dashes" if known else ""


def _fit(options: argparse.Namespace) -> int:
    from train.recipes.recipe import load_recipe, refuse_absent_paths

    overrides = [*options.overrides, *(["run.progress=false"] if options.quiet else [])]
    config = load_recipe(options.recipe, overrides)
    refuse_absent_paths(config)
    if options.ranks is not None:
        from train.ranks.launch import launch

        return launch(options.arguments, options.ranks)
    from train.trainer import fit  # after the checks that do not need it: importing torch takes seconds

    return _print(fit(config, options.resume), options)


def _validate(options: argparse.Namespace) -> int:
    from train.evaluation.results import check_result_files, write_validation
    from train.evaluation.validate import validate

    check_result_files(options.out, options.matrix)
    if options.masks is not None:
        return _validate_masks(options)
    validation = validate(
        options.checkpoint,
        options.images,
        ema=options.ema,
        real=options.real,
        batch_size=options.batch_size,
        backend=options.backend,
        device=options.device,
        img_size=options.img_size,
        crop_pct=options.crop_pct,
        progress=not options.quiet,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0  # only the first rank prints
    write_validation(validation, options.out, options.matrix)
    if options.json:
        values = asdict(validation)
        wanted = {"per_class": len(validation.per_class) if options.per_class else 0, "confusions": options.confusions}
        for name, most in wanted.items():
            parts = values.pop(name)
            values |= {name: parts[:most]} if most else {}
        print(json.dumps(values))
    else:
        print(validation.text(options.per_class, options.confusions))
    return 0


def _validate_masks(options: argparse.Namespace) -> int:
    from train.evaluation.results import write_mask_scores
    from train.segmentation.predict import find_segmenter, validate_masks

    _refuse_options(options, "real", "matrix", "confusions", "img_size", "crop_pct")
    segmenter = find_segmenter(options.checkpoint, options.ema)
    if segmenter is None:
        raise InputError("--masks is for segmentation runs", got=options.checkpoint)
    found = validate_masks(
        segmenter, str(options.images), str(options.masks), device=options.device, progress=not options.quiet
    )
    if os.environ.get("RANK", "0") == "0":
        score = asdict(found.score) | {"names": found.names, "checkpoint": found.checkpoint}
        score["iou"] = [None if iou != iou else iou for iou in found.score.iou]  # JSON has no NaN
        write_mask_scores(score, options.out)
        print(json.dumps(score) if options.json else found.text(options.per_class))
    return 0


def _refuse_options(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError if an option is given that a segmentation run does not have."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if given:
        raise InputError(f"{given[0]} is for classifiers", got="a segmentation run", remedy="Leave it out.")


def _print(result: Any, options: argparse.Namespace) -> int:
    """Print a result; under torchrun only on the first rank, which has the results of all."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(result)) if options.json else result.text())
    return 0


def _predict(options: argparse.Namespace) -> int:
    from train.evaluation.predict import predict
    from train.evaluation.results import prediction_table
    from train.segmentation.predict import find_segmenter, predict_masks

    if (segmenter := find_segmenter(options.checkpoint, options.ema)) is not None:
        _refuse_options(options, "csv", "map", "img_size", "crop_pct")
        out, quiet = options.out or PICTURES, options.quiet
        masks = predict_masks(
            segmenter, options.images, out, device=options.device, lines=sys.stdin, progress=not quiet
        )
        return _say_all(masks, lambda one: None, options)
    if options.out is not None and not options.map:
        raise InputError("--out is the folder for the pictures of --map", remedy="Give both, or neither.")
    predictions = predict(
        options.checkpoint,
        options.images,
        top=options.top,
        ema=options.ema,
        maps=(options.out or PICTURES) if options.map else None,
        device=options.device,
        img_size=options.img_size,
        crop_pct=options.crop_pct,
        batch_size=options.batch_size,
        lines=sys.stdin,
        progress=not options.quiet,
    )
    with prediction_table(options.csv) as add:
        return _say_all(predictions, add, options)


def _say_all(results: Iterable[Any], add: Callable[[Any], None], options: argparse.Namespace) -> int:
    """Print results of images as they come. Returns the exit status."""
    from tqdm import tqdm

    count = left_out = 0
    say = tqdm.write if sys.stdout.isatty() else print  # not into the bar
    for one in results:
        count += 1
        add(one)
        if one.problem is not None:
            left_out += 1
            tqdm.write(one.text(), file=sys.stderr)
        if options.json or one.problem is None:
            say(json.dumps(asdict(one)) if options.json else one.text())
        sys.stdout.flush()
    if left_out:
        print(f"{left_out:,} of {count:,} images were left out", file=sys.stderr)
    return LEFT_OUT if left_out else 0


def _explain(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from train.explain.explain import explain

    done = explain(
        options.checkpoint,
        options.images,
        options.out,
        ema=options.ema,
        device=options.device,
        img_size=options.img_size,
        crop_pct=options.crop_pct,
        lines=sys.stdin,
    )
    shown = tqdm(done, desc="images", unit=" images", leave=False, disable=options.quiet)
    return _say_all(shown, lambda one: None, options)


def _export(options: argparse.Namespace) -> int:
    from train.export.export import export

    done = export(
        options.checkpoint,
        options.images,
        out=options.out,
        format=options.format,
        int8=options.int8,
        count=options.count,
        ema=options.ema,
        img_size=options.img_size,
        crop_pct=options.crop_pct,
    )
    return _print(done, options)


def _doctor(options: argparse.Namespace) -> int:
    from train.doctor import diagnose, text

    findings = diagnose()
    print(json.dumps(findings) if options.json else text(findings))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from train.recipes.listing import listing, setting_rows
    from train.recipes.recipe import RECIPES, load_recipe, recipe_names, recipe_path

    if options.recipe is not None:
        config, path = load_recipe(options.recipe), recipe_path(options.recipe)
        values = {"recipe": str(options.recipe), "file": str(path), "settings": setting_rows(config)}
        print(json.dumps(values) if options.json else f"{path}\n\n{listing(config)}")
        return 0
    if options.json:
        print(json.dumps({"recipes": list(recipe_names()), "settings": setting_rows()}))
        return 0
    for name in recipe_names():
        comment = (RECIPES / f"{name}.toml").read_text().split("\n\n")[0]
        print(f"{name}\n" + "\n".join("    " + line.removeprefix("#").strip() for line in comment.splitlines()))
    return 0


def _all_settings() -> str:
    from train.recipes.listing import listing

    return f"settings (the section may be omitted if only one has the key; key=none unsets)\n\n{listing()}"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program("train"), description="Training with token labels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = add_command(commands, "fit", _fit, "train a model by a recipe; under torchrun with several ranks")
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
    validate = add_command(commands, "validate", _validate, "measure top-1 and top-5 accuracy on images")
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
    predict = add_command(commands, "predict", _predict, PREDICT, "print one JSON object per line, for each image")
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
    text = "print one JSON object per line, for each image, with the numbers of each layer"
    explain = add_command(commands, "explain", _explain, EXPLAIN, text)
    explain.add_argument("checkpoint", type=Path, help="as for validate; a DeMansia, Vim, MILA or MambaVision network")
    explain.add_argument("images", nargs="+", metavar="PATH", help="as for predict")
    text = f"folder for a page per image, with its pictures beside it; for one image also a name.html ({EXPLAINED})"
    explain.add_argument("--out", type=Path, default=EXPLAINED, metavar="DIR", help=text)
    explain.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    explain.add_argument("--device", default="auto", help="cpu, cuda or auto")
    export = add_command(commands, "export", _export, EXPORT)
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
    for command in (validate, predict, explain, export):
        command.add_argument(
            "--img-size", type=at_least(1), metavar="N", help="side of the input in pixels (default: as in training)"
        )
        command.add_argument(
            "--crop-pct",
            type=float,
            metavar="SHARE",
            help="the crop's share of the image's shorter side (default: as in training)",
        )
    text = "show which parts of this machine can be used, and why others cannot"
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print the result as one JSON object")
    text = "list the packaged recipes, or all settings of one with their defaults and meanings"
    recipes = commands.add_parser("recipes", help=text, description=text)
    recipes.set_defaults(run=_recipes)
    recipes.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a packaged recipe, or a .toml file")
    recipes.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
