"""Result files: predictions as a table; an evaluation as JSON, a table of classes, or a confusion matrix."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeler.base.errors import InputError, error_text
from labeler.base.whole_files import replace_file, text_written_whole
from train.evaluation.tally import ClassAccuracy

if TYPE_CHECKING:
    from train.evaluation.predict import Prediction
    from train.evaluation.validate import Validation


@contextmanager
def prediction_table(path: Path | None) -> Iterator[Callable[[Prediction], None]]:
    """Write predictions to a CSV file, which appears only when the context ends without an error.

    The columns are those of timm's `inference.py`. An image that was left out has no line.

    Args:
        path: the file; None: nothing is written.

    Yields:
        A function that adds a prediction.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    _check(path, "table")
    with text_written_whole(path) as file:
        rows, count = csv.writer(file, lineterminator="\n"), 0

        def add(one: Prediction) -> None:
            nonlocal count
            if one.problem is None:
                if not count:
                    rows.writerow(_columns(len(one.classes)))
                rows.writerow([one.image, *(part for of in _fields(one) for part in of)])
                count += 1

        yield add
        if not count:
            rows.writerow(_columns(1))


def _columns(top: int) -> list[str]:
    ends = [""] if top == 1 else [f"_{i}" for i in range(top)]
    return ["filename", *(f"{name}{end}" for name in ("index", "label", "prob") for end in ends)]


def _fields(one: Prediction) -> tuple[list[object], ...]:
    classes = one.classes
    return [c.id for c in classes], [c.name for c in classes], [f"{c.probability:.6g}" for c in classes]


def check_result_files(out: Path | None, matrix: Path | None) -> None:
    """Raise InputError, before any work, if `write_validation` could not write these files."""
    if out is not None and out.suffix not in (".json", ".csv"):
        raise InputError("`out` has an unknown extension", got=str(out), expected="a name that ends in .json or .csv")
    if matrix is not None and matrix.suffix != ".csv":
        raise InputError("`matrix` has an unknown extension", got=str(matrix), expected="a name that ends in .csv")
    for path in (out, matrix):
        if path is not None:
            _check(path, "result file")


def _check(path: Path, what: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the {what} {str(path)!r} cannot be written", got=error_text(error)) from None
    if path.is_dir():
        raise InputError(f"the {what} {str(path)!r} cannot be written", got="a folder of that name")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"the {what} {str(path)!r} cannot be written", got="a folder without write permission")


def write_validation(validation: Validation, out: Path | None, matrix: Path | None) -> None:
    """Write the results of an evaluation.

    Args:
        validation: the results.
        out: .json for everything, .csv for a table of classes; None: not written.
        matrix: .csv for the confusion matrix; None: not written.
    """
    if out is not None and out.suffix == ".json":
        replace_file(out, json.dumps(asdict(validation), indent=1, ensure_ascii=False).encode() + b"\n")
    elif out is not None:
        names = tuple(ClassAccuracy.__dataclass_fields__)
        _write_rows(out, [names, *(tuple(asdict(one).values()) for one in validation.per_class)])
    if matrix is not None:
        _write_rows(matrix, confusion_matrix(validation))


def write_mask_scores(score: Mapping[str, Any], out: Path | None) -> None:
    """Write the results of an evaluation on masks.

    Args:
        score: what `validate --json` prints.
        out: .json for everything, .csv for a table of classes; None: not written.
    """
    if out is not None and out.suffix == ".json":
        replace_file(out, json.dumps(score, indent=1, ensure_ascii=False).encode() + b"\n")
    elif out is not None:
        rows = zip(score["names"], score["iou"], score["pixels"], strict=True)
        _write_rows(out, [["name", "iou", "pixels"], *map(list, rows)])


def confusion_matrix(validation: Validation) -> list[list[object]]:
    """Counts with headings: a row for each true class and a column for each prediction, of all classes that occur."""
    counts = {(one.id, one.taken_for_id): one.images for one in validation.confusions}
    names = {one.id: one.name for one in validation.per_class} | {
        one.taken_for_id: one.taken_for for one in validation.confusions
    }
    for one in validation.per_class:
        counts[one.id, one.id] = round(one.top1 * one.images)
    order = sorted(names)
    rows: list[list[object]] = [[f"{a} {names[a]}", *(counts.get((a, b), 0) for b in order)] for a in order]
    return [["true class", *(f"{c} {names[c]}" for c in order)], *rows]


def _write_rows(path: Path, rows: list) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_file(path, text.getvalue().encode())
