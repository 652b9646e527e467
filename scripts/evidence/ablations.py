"""What in token labels matters: ways to teach, places, stores, maps, teachers, settings, micro-batches, budgets."""

from __future__ import annotations

from dataclasses import replace

from scripts.evidence.tables import FAMILIES, IMAGE_LABEL, MAPS, TOKEN_LABELS, Choice, Labels, Table

WHOLE = Labels("whole", teacher="whole")
TUNED = Labels("tuned", side=128, own_pictures=True)
TRUE = {cells: Labels(f"true-{cells}", true_cells=cells) for cells in (1, 2, 4, 8, 16)}

POOLED = ("loss.dense_weight=0",)
EVERY_TOKEN = Choice("every-token", "image label on every token", ("data.token_labels=false",))

# The last row of each table is what `fit` does with a store, without any choice.
WAYS = (
    IMAGE_LABEL,
    EVERY_TOKEN,
    Choice("pooled", "teacher's pooled answer for the crop, class token only", POOLED),
    Choice("placeless", "teacher's answer for the picture on every token", labels=WHOLE),
    TOKEN_LABELS,
)

SMALL = ("run.batch_size=32", "schedule.warmup_epochs=0.1", "run.eval_every=100", "run.log_every=50")
CIFAR = (*SMALL, "schedule.steps=600", "model.args={patch_size=8, embed_dim=80, depth=4, d_state=8, expand=1}")
MOSAICS = (
    *SMALL,
    "schedule.steps=400",
    "model.img_size=64",
    "model.args={patch_size=8, embed_dim=64, depth=4, d_state=8, expand=1, stem_width=16}",
)


def on_cifar(name: str, *rows: Choice) -> Table:
    """A table of one arm: token labels of CIFAR-10, each row compared with the first."""
    return Table(name, "cifar10_nano", CIFAR, rows, (TOKEN_LABELS,))


def on_mosaics(name: str, *rows: Choice) -> Table:
    """The same with mosaics."""
    return Table(name, "cifar10_nano", MOSAICS, rows, (TOKEN_LABELS,), "mosaics")


def with_settings(name: str, title: str, *overrides: str) -> Choice:
    return Choice(name, title, overrides)


SMALL_CROPS = "augment.scale=[0.08, 1.0]"
FULL = ("--precision", "float16", "--palette", "10")
PARTS, FROZEN = "run.micro_batch=4", "model.freeze_statistics=true"
AS_IS = Choice("default", "as it is")
TABLES = {
    table.name: table
    for table in (
        FAMILIES,
        on_cifar("ways", *WAYS),
        on_mosaics(
            "mosaics",
            *WAYS,
            Choice("tuned-pooled", "pooled answer of a teacher of mosaics, class token only", POOLED, TUNED),
            Choice("tuned", "token labels of a teacher of mosaics", labels=TUNED),
        ),
        on_mosaics(
            "truth",
            replace(IMAGE_LABEL, labels=TRUE[8]),
            replace(EVERY_TOKEN, labels=TRUE[8]),
            Choice("pooled", "true shares of the crop, class token only", POOLED, TRUE[8]),
            Choice("placeless", "true shares of the picture on every token", labels=TRUE[1]),
            Choice("swapped", "true maps of 8×8 cells, cropped with swapped axes", labels=TRUE[8], swapped=True),
            *(Choice(f"{cells}", f"true maps of {cells}×{cells} cells", labels=TRUE[cells]) for cells in (2, 4, 8, 16)),
        ),
        on_cifar(
            "crops",
            Choice("swapped", "axes of the labels' crops swapped", swapped=True),
            Choice("right", "labels cropped as the images are"),
        ),
        on_mosaics(
            "small-crops",
            replace(EVERY_TOKEN, overrides=(*EVERY_TOKEN.overrides, SMALL_CROPS), labels=TRUE[8]),
            Choice("swapped", "true maps, cropped with swapped axes", (SMALL_CROPS,), TRUE[8], swapped=True),
            Choice("right", "true maps, cropped as the images are", (SMALL_CROPS,), TRUE[8]),
        ),
        on_cifar(
            "grids",
            Choice("1", "1×1 cell", labels=WHOLE),
            Choice("2", "2×2 cells", labels=Labels("cells-2", teacher="cells_2")),
            Choice("3", "3×3 cells, the teacher's map of 96 pixels", labels=MAPS),
            Choice("6", "6×6 cells, the teacher's map of 192 pixels", labels=Labels("cells-6", side=192)),
        ),
        on_cifar(
            "teachers",
            IMAGE_LABEL,
            *(
                Choice(str(steps), f"teacher of {steps} steps", labels=Labels(f"teacher-{steps}", steps=steps))
                for steps in (20, 80, 250)
            ),
            Choice("624", "teacher of 624 steps", labels=MAPS),
            Choice("1250", "teacher of 1,250 steps", labels=Labels("teacher-1250", steps=1250)),
        ),
        on_cifar(
            "stores",
            Choice("default", "default", labels=MAPS),
            Choice("low", "`--quality low`", labels=Labels("low", options=("--quality", "low"))),
            Choice("high", "`--quality high`", labels=Labels("high", options=("--quality", "high"))),
            Choice(
                "full", "all classes, float16",
                labels=Labels("full", options=FULL),
            ),
            Choice("top-five", "five logits a cell, all others 0", labels=Labels("top-five", "top_five", options=FULL)),
        ),
        on_cifar(
            "settings",
            AS_IS,
            with_settings("mixtoken", "MixToken", "augment.mix=token"),
            Choice("flip", "labels of both mirrorings, averaged", labels=Labels("flip", options=("--tta", "flip"))),
            with_settings("hot", "temperature 2", "loss.temperature=2"),
            with_settings("cooling", "temperature from 3 to 1", "loss.temperature=3", "loss.final_temperature=1"),
            with_settings("sharp", "no smoothing", "loss.smoothing=0"),
            with_settings("weight-25", "weight of the token loss 0.25", "loss.dense_weight=0.25"),
            with_settings("weight-50", "weight of the token loss 0.5", "loss.dense_weight=0.5"),
        ),
        on_cifar(
            "accumulation",
            Choice("whole", "32 images at once"),
            with_settings("parts", "8 times 4 images", PARTS),
            with_settings("whole-frozen", "32 images at once, frozen statistics", FROZEN),
            with_settings("parts-frozen", "8 times 4 images, frozen statistics", PARTS, FROZEN),
        ),
        Table(
            "budget",
            "cifar10_nano",
            CIFAR,
            tuple(
                with_settings(f"steps-{steps}", f"{steps:,} steps", f"schedule.steps={steps}")
                for steps in (150, 600, 2400)
            ),
            (IMAGE_LABEL, TOKEN_LABELS),
        ),
    )
}  # fmt: skip
