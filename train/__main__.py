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
from typing import Any

from labeler.base.command_line import parser_of_command, parser_of_commands, run_command
from labeler.base.errors import InputError
from train.arguments import ADDED, PICTURES
from train.ranks.rank_errors import first_rank_first

LEFT_OUT = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _options(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    options.run = first_rank_first(options.run)
    return run_command(options, extra="train")


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return parser_of_commands("train", "Training with token labels.", ADDED, RUNS)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, for completion and documentation."""
    return parser_of_command(command_parser(), command)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; argparse alone does not accept overrides after a flag."""
    parser = command_parser()
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


RUNS = {
    "fit": _fit,
    "validate": _validate,
    "predict": _predict,
    "explain": _explain,
    "export": _export,
    "doctor": _doctor,
    "recipes": _recipes,
}


if __name__ == "__main__":
    sys.exit(main())
