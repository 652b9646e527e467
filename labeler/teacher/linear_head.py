"""A linear head for the pooled features of a frozen network: its file, and how it becomes the network's classifier.

The network must have timm's `forward_features`, `forward_head` and `reset_classifier`. One that reads its class token,
or pools tokens by attention, gets the mean of its patch tokens instead: the head is then fitted to the same features
that it scores at each location, and the mean of a map equals the head's output.

Legend: B batch, C classes, D feature width, S side of the input.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labeler.base.errors import MismatchError, TeacherError, error_text
from labeler.teacher.weights import weights_sha256

METADATA = "token_labeling_head"
PROTOCOL = ("forward_features", "forward_head", "reset_classifier", "get_classifier")
NOT_THE_MEAN = ("token", "map")  # poolings that are replaced by the mean of the patch tokens
TOLERANCE = 1e-3  # of the largest logit; GPUs may round to ten bits


@dataclass(frozen=True)
class HeadFit:
    """How well a head does on images that it was not fitted on.

    Attributes:
        accuracy: Share of the held-out images whose class has the largest logit.
        standard_error: Of `accuracy`.
        chance: The accuracy of always answering the most frequent class.
        held_out: Number of held-out images.
        fitted: Number of images that the head was fitted on.
        skipped: Number of chosen images that could not be read.
        cross_entropy: Of the held-out images, in nats.
        l2: Strength of the L2 penalty, chosen for the smallest `cross_entropy`.
    """

    accuracy: float
    standard_error: float
    chance: float
    held_out: int
    fitted: int
    skipped: int
    cross_entropy: float
    l2: float

    def text(self) -> str:
        """Returns one line about it."""
        skipped = f", {self.skipped:,} could not be read" if self.skipped else ""
        return (
            f"linear head fitted on {self.fitted:,} images{skipped}: {self.accuracy:.1%} ± {self.standard_error:.1%} "
            f"of {self.held_out:,} held-out images right (chance {self.chance:.1%})"
        )


@dataclass(frozen=True)
class LinearHead:
    """A linear head.

    Attributes:
        weight: float32 [C, D].
        bias: float32 [C].
        classes: Names of the classes.
        features_sha256: Digest of the frozen network.
        fitted_with: What else decided its values: the images, and how the network saw them.
        fit: How well it does.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    features_sha256: str
    fitted_with: dict[str, Any]
    fit: HeadFit

    def to_bytes(self) -> bytes:
        """Returns the content of its file, in the format safetensors."""
        from safetensors.torch import save

        about: dict[str, Any] = {"classes": self.classes, "features_sha256": self.features_sha256}
        about |= {"fitted_with": self.fitted_with, "fit": asdict(self.fit)}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        return save(tensors, {METADATA: json.dumps(about, ensure_ascii=False, sort_keys=True)})


def read_head(path: str | Path) -> tuple[LinearHead, str]:
    """Reads a head. Nothing in its file is run.

    Returns:
        (head, sha256 of the file).

    Raises:
        TeacherError: There is no such file, or it is not a head.
    """
    from safetensors.torch import load

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TeacherError(f"the linear head {str(path)!r} cannot be read", got=error_text(error)) from None
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about, tensors = json.loads(header["__metadata__"][METADATA]), load(data)
        classes, weight, bias = tuple(about["classes"]), tensors["weight"], tensors["bias"]
        if weight.dim() != 2 or tuple(bias.shape) != (len(weight),) or len(classes) != len(weight):
            raise ValueError(f"weight {list(weight.shape)}, bias {list(bias.shape)}, {len(classes)} classes")
        fit = HeadFit(**about["fit"])
        head = LinearHead(weight, bias, classes, about["features_sha256"], dict(about["fitted_with"]), fit)
    except Exception as error:  # a damaged file can fail anywhere
        got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise TeacherError(f"{str(path)!r} is not a linear head", got=got, expected="what `fit_head` wrote") from None
    return head, hashlib.sha256(data).hexdigest()


def head_record(path: str | Path) -> dict[str, Any]:
    """Returns what a store's plan records of a head: its file, how many images it was fitted on, and its accuracy."""
    head, digest = read_head(path)
    size = Path(path).stat().st_size
    return {"sha256": digest, "size": size, "most_images": head.fitted_with.get("most_images"), **asdict(head.fit)}


def give_head(model: Any, num_classes: int, name: str) -> None:
    """Gives a network a new, untrained classifier; 0: none. Raises TeacherError if it has not timm's methods."""
    missing = next((method for method in PROTOCOL if not hasattr(model, method)), None)
    if missing or hasattr(model, "score_maps"):
        raise TeacherError(
            f"no linear head can be fitted to teacher {name}",
            got=f"a network without {missing}" if missing else "a network that makes its own score maps",
            expected="a timm network", remedy="Fine-tune it instead: `token-labeling fit teacher`.",
        )  # fmt: skip
    pooling = ("avg",) if getattr(model, "global_pool", None) in NOT_THE_MEAN else ()
    try:
        model.reset_classifier(num_classes, *pooling)
    except Exception as error:  # whatever a network finds wrong with it
        raise _not_linear(name, (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")) from error


def frozen_sha256(model: Any, name: str) -> str:
    """Removes a network's classifier, and returns the digest of the rest."""
    give_head(model, 0, name)
    return weights_sha256(model)


def pooled_features(model: Any, images: Tensor) -> Tensor:
    """Computes the features [B, D] of images [B, 3, S, S] that the classifier reads."""
    return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)


def set_head(model: Any, head: LinearHead, name: str) -> None:
    """Makes a head the classifier of the network that it was fitted for.

    Raises:
        MismatchError: The network has other weights.
        TeacherError: Its classifier is not one linear layer.
    """
    digest = frozen_sha256(model, name)
    if digest != head.features_sha256:
        raise MismatchError(
            f"the linear head was fitted for another network than teacher {name}", got=f"weights {digest[:12]}",
            expected=head.features_sha256[:12], remedy="Give the `teacher` and `checkpoint` that it was fitted with.",
        )  # fmt: skip
    give_head(model, len(head.classes), name)
    layer = linear_layer(model, name)
    if layer.weight.numel() != head.weight.numel():
        got, expected = head.weight.shape[1], layer.weight.numel() // len(layer.weight)
        raise TeacherError(f"the linear head does not fit teacher {name}", got=f"{got} features", expected=expected)
    with torch.no_grad():
        layer.weight.copy_(head.weight.reshape(layer.weight.shape))
        layer.bias.copy_(head.bias)  # type: ignore[union-attr]


def linear_layer(model: Any, name: str) -> nn.Linear | nn.Conv2d:
    """Returns the network's classifier. Raises TeacherError if it is not one linear layer with a bias."""
    layer = model.get_classifier()
    point = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    if (isinstance(layer, nn.Linear) or point) and layer.bias is not None:
        return layer
    raise _not_linear(name, f"{type(layer).__name__}")


def check_linear(model: Any, images: Tensor, name: str) -> None:
    """Checks on images [B, 3, S, S] that the output is the classifier's linear layer of the pooled features."""
    layer = linear_layer(model, name)
    features = model.forward_features(images)
    try:
        pooled = model.forward_head(features, pre_logits=True).flatten(1)
        expected = nn.functional.linear(pooled, layer.weight.flatten(1), layer.bias)
        output = model.forward_head(features)
        difference = float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    except (TypeError, AttributeError, RuntimeError) as error:
        raise _not_linear(name, (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")) from error
    if not difference <= TOLERANCE:
        raise _not_linear(name, f"a difference of {difference:.1e} of the largest logit")


def _not_linear(name: str, got: str) -> TeacherError:
    """Returns the error for a network whose classifier cannot be replaced by a linear head."""
    return TeacherError(
        f"no linear head can be fitted to teacher {name}", got=got,
        expected="a classifier that is one linear layer on the pooled features",
        remedy="Choose another network, or fine-tune this one: `token-labeling fit teacher`.",
    )  # fmt: skip
