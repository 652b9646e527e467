"""The students' part of the demo's report: their accuracy, curves, and predictions drawn over test scenes.

Legend: B images; C classes; h×w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from labeler.base.whole_files import replace_file
from labeler.report.charts import COLOURS, lay_over, picture
from labeler.report.template import fill
from pipeline.batch_picture import WHOLE
from scripts.demo.students import Student
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import load_trained
from train.record.curves import draw_comparison

PICTURES, SIDE = 16, 170


@dataclass(frozen=True)
class Answer:
    """A test scene and what the students predict.

    Attributes:
        image: The scene as an <img> tag.
        overlay: The same with the last student's tokens.
        legend: (color, class name) of the tokens' most common classes.
        true: Name of the true class.
        predicted: (student, class name) of each student.
    """

    image: Markup
    overlay: Markup
    legend: list[tuple[tuple[int, int, int], str]]
    true: str
    predicted: list[tuple[str, str]]


def add_students(page: Path, students: Sequence[Student], scenes: Path) -> None:
    """Inserts the comparison before the first heading of the report on the labels."""
    curves = page.with_name("students.png")
    draw_comparison({student.arm: student.folder for student in students}, curves)
    with Image.open(curves) as image:
        drawn = picture(image.convert("RGB"), 92)
    part = fill(
        "report.html", Path(__file__).parent,
        students=students, curves=drawn, answers=answers(students, scenes / "test"),
    )  # fmt: skip
    text = page.read_text("utf-8")
    replace_file(page, text.replace("<h2>", f"{part}<h2>", 1).encode())


@torch.inference_mode()
def answers(students: Sequence[Student], images: Path) -> list[Answer]:
    """Predicts some test scenes with each student."""
    trained = [load_trained(student.folder) for student in students]
    files = sorted(images.glob("*/*.jpg"))
    files = [files[i] for i in np.sort(np.random.default_rng(0).permutation(len(files))[:PICTURES])]
    pixels = [load_image(file, trained[0]) for file in files]
    inputs = normalized(pixels, trained[0])
    guesses = [one.net(inputs).argmax(1).tolist() for one in trained]
    confidence, classes = trained[-1].net.score_maps(inputs).softmax(1).max(1)
    names = trained[0].class_names
    found = []
    for b, file in enumerate(files):
        image = Image.fromarray(pixels[b]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        tints = np.array(COLOURS, np.uint8)[classes[b].numpy()]
        overlay = lay_over(image, tints, 0.15 + 0.75 * confidence[b].numpy(), WHOLE)
        count = classes[b].flatten().bincount()
        common = [c for c in count.argsort(descending=True).tolist()[:3] if count[c]]
        predicted = [(student.arm, names[guess[b]]) for student, guess in zip(students, guesses, strict=True)]
        true = names[trained[0].class_folders[file.parent.name]]
        legend = [(COLOURS[c], names[c]) for c in common]
        found.append(Answer(picture(image), picture(overlay), legend, true, predicted))
    return found
