"""What is trained: each table's rows and arms, as settings of a recipe. A further table is a further entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Labels:
    """How a label store is made.

    Attributes:
        name: of its folder.
        teacher: function of `scripts.evidence.teachers`; empty: the fine-tuned network itself.
        side: pixels that the teacher sees; None: as the table's pictures need.
        options: further options of `label`.
        steps: of the teacher's fine-tuning; None: the usual number.
        true_cells: cells of a side of mosaics' true maps; None: a teacher makes the maps.
        own_pictures: fine-tune the teacher further, on the table's own pictures, at `side` pixels.
    """

    name: str
    teacher: str = ""
    side: int | None = None
    options: tuple[str, ...] = ()
    steps: int | None = None
    true_cells: int | None = None
    own_pictures: bool = False


MAPS = Labels("maps")


@dataclass(frozen=True)
class Choice:
    """A row or an arm of a table.

    Attributes:
        name: how it is called in file names.
        title: how it is called in the table.
        overrides: what it changes in the recipe, `section.key=value`.
        labels: the store that it trains from.
        swapped: crop the labels' maps with swapped axes, as published code does.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    labels: Labels = MAPS
    swapped: bool = False


@dataclass(frozen=True)
class Table:
    """A table: every row is trained in every arm with every seed.

    Attributes:
        name: as on the command line.
        recipe: a packaged recipe.
        overrides: what all of its runs change in the recipe.
        rows: what is compared.
        arms: two ways to teach each row, of which the second is compared with the first; or one, and then each row is
            compared with the first row.
        pictures: "cifar10" or "mosaics".
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    rows: tuple[Choice, ...]
    arms: tuple[Choice, ...]
    pictures: str = "cifar10"

    def labels_of(self, row: Choice, arm: Choice) -> Labels:
        """The store of a run: the row's, unless it has none of its own."""
        return row.labels if row.labels != MAPS else arm.labels


IMAGE_LABEL = Choice("image-label", "image label", ("data.store=none",))
TOKEN_LABELS = Choice("token-labels", "token labels")


def network(name: str, title: str, model: str, args: str) -> Choice:
    """A row: a model of timm's names with other arguments, in TOML's notation."""
    return Choice(name, title, (f"model.name={model}", f"model.args={{{args}}}"))


def mixer(name: str, width: int, depth: int, more: str = "") -> Choice:
    """A row: DeMansia's block with another mixer."""
    shape = f"patch_size=8, embed_dim={width}, depth={depth}"
    return network(name, f"DeMansia, `{name}`", "demansia_nano", f'{shape}, mixer="{name}"{more}')


# All see 32x32 pixels as 4x4 tokens. Widths and depths are chosen for about the same number of parameters.
FAMILIES = Table(
    name="families",
    recipe="cifar10_nano",
    overrides=(
        "run.batch_size=32",
        "schedule.steps=200",
        "schedule.warmup_epochs=0.05",
        "run.eval_every=100",
        "run.log_every=50",
    ),
    rows=(
        network("demansia", "DeMansia, `mamba`", "demansia_nano", "patch_size=8, embed_dim=80, depth=4, d_state=8"),
        network("vim", "Vim", "vim_tiny", "patch_size=8, embed_dim=96, depth=5, d_state=8"),
        network("lvvit", "LV-ViT", "lvvit_t", "patch_size=8, embed_dim=80, depth=4, num_heads=2"),
        network("mila", "MILA", "mila_nano", "patch_size=4, embed_dim=64, depths=[1, 2], mlp_ratio=1.0"),
        network(
            "mambavision", "MambaVision", "mambavision_nano", "patch_size=2, embed_dim=24, num_heads=[1, 2, 4]"
        ),
        network("mambaout", "MambaOut", "mambaout_femto", "depths=[2, 3], dims=[48, 96]"),
        network("demansia2", "DeMansia-2", "demansia2_tiny", "patch_size=8, embed_dim=72, depth=4, d_state=32"),
        mixer("attention", 80, 8, ", mixer_options={head_dim=40}"),
        mixer("linear_attention", 80, 4),
        mixer("gated_conv", 80, 5),
        network(
            "forward", "DeMansia, `mamba`, one direction", "demansia_nano",
            'patch_size=8, embed_dim=80, depth=5, d_state=8, directions="forward"',
        ),
        mixer("mamba2", 80, 4, ", d_state=32, mixer_options={head_dim=40}"),
        mixer("mamba3", 80, 4, ", d_state=32, mixer_options={head_dim=40}"),
    ),
    arms=(IMAGE_LABEL, TOKEN_LABELS),
)  # fmt: skip
