"""The students' part of the demo's report: their accuracy, curves, and predictions drawn over test scenes.

Legend: B images; C classes; h×w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from labeler.base.whole_files import replace_file
from labeler.report.charts import COLOURS, lay_over, picture
from pipeline.view import WHOLE
from scripts.demo_students import Student
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import load_trained
from train.record.curves import draw_comparison

PICTURES, SIDE = 16, 170


def add_students(page: Path, students: Sequence[Student], scenes: Path) -> None:
    """Insert the comparison before the first chapter of the labeler's report."""
    curves = page.with_name("students.png")
    draw_comparison({student.arm: student.folder for student in students}, curves)
    rows = "".join(
        f"<tr><td>{escape(s.arm)}</td><td class='n'>{s.accuracy:.1%}</td><td class='n'>{s.images_per_s:,.0f}</td></tr>"
        for s in students
    )
    parts = [
        "<h2>Does it help?</h2>",
        '<p class="soft">The same small DeMansia, trained on the same scenes for the same few steps with one seed, '
        "taught in three ways. The middle one has a loss on every token, too, but no map: what lies between it and the "
        "last is what the <b>map</b> adds. Scenes made for it and a short training: not what to expect elsewhere.</p>",
        "<table><tr><th>taught by</th><th class='n'>right on unseen scenes</th><th class='n'>images/s</th></tr>",
        f"{rows}</table>",
        f"<p>{picture_of(curves)}</p><h2>What the students answer</h2>",
        '<p class="soft">Unseen scenes. Right of each image, the tokens of the student with token labels, in the '
        "colour of their most probable class, the stronger the surer.</p>",
        f'<div class="maps">{answers(students, scenes / "test")}</div>',
    ]
    text = page.read_text("utf-8")
    replace_file(page, text.replace("<h2>", "\n".join(parts) + "<h2>", 1).encode())


def picture_of(path: Path) -> str:
    with Image.open(path) as image:
        return picture(image.convert("RGB"), 92).replace("<img ", '<img style="max-width:100%;height:auto" ')


@torch.inference_mode()
def answers(students: Sequence[Student], images: Path) -> str:
    """HTML of some test scenes with each student's prediction."""
    trained = [load_trained(student.folder) for student in students]
    files = sorted(images.glob("*/*.jpg"))
    files = [files[i] for i in np.sort(np.random.default_rng(0).permutation(len(files))[:PICTURES])]
    pixels = [load_image(file, trained[0]) for file in files]
    inputs = normalized(pixels, trained[0])
    guesses = [one.net(inputs).argmax(1).tolist() for one in trained]
    confidence, classes = trained[-1].net.score_maps(inputs).softmax(1).max(1)
    names = trained[0].class_names
    parts = []
    for b, file in enumerate(files):
        truth = trained[0].class_folders[file.parent.name]
        image = Image.fromarray(pixels[b]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        tints = np.array(COLOURS, np.uint8)[classes[b].numpy()]
        overlay = lay_over(image, tints, 0.15 + 0.75 * confidence[b].numpy(), WHOLE)
        lines = "".join(
            f"<div>{'✓' if guess[b] == truth else '✗'} {escape(student.arm)}: {escape(names[guess[b]])}</div>"
            for student, guess in zip(students, guesses, strict=True)
        )
        count = classes[b].flatten().bincount()
        present = [c for c in count.argsort(descending=True).tolist()[:3] if count[c]]
        legend = "".join(f'<span><i style="background:rgb{COLOURS[c]}"></i>{escape(names[c])}</span>' for c in present)
        parts.append(
            f'<div class="map"><div class="pair">{picture(image)}{picture(overlay)}</div>'
            f'<div class="legend">{legend}</div><div class="name">is <b>{escape(names[truth])}</b>{lines}</div></div>'
        )
    return "".join(parts)
