"""The selective scan: checks of its inputs and the choice of a backend.

Legend: K directions, B batch, L length, E inner width, N state size, G groups of channels that share B and C.

| backend   | file | runs on | what it is |
|---|---|---|---|
| reference | `scan_reference` | anything | a loop over time, differentiated by autograd |
| cpu       | `scan_cpu` | CPU | forward and backward by hand, in torch's operators |
| numba     | `fused_cpu/scan` | CPU | a fused kernel for each of both, compiled by Numba at the first use |
| triton    | `scan_triton` | GPU, or a CPU with TRITON_INTERPRET=1 | a fused kernel for each of both; not float64 |
| mamba_ssm | this one | GPU | the kernels of the mamba-ssm package, one direction at a time; not float64 |

"auto" means triton on a GPU that can run it, numba or else cpu on a CPU, and reference otherwise; the environment
variable TOKEN_LABELING_SCAN overrides "auto". A compiled model keeps the choice that was made when it was traced.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch.nn import functional as F

from labeler.base.errors import BackendError, ModelError
from model.ops.scan_operators import scan_cpu, scan_numba, scan_triton
from model.ops.scan_reference import last_state, scan_by_doubling, scan_reference, state_dtype

BACKENDS = ("reference", "cpu", "numba", "triton", "mamba_ssm")
VARIABLE = "TOKEN_LABELING_SCAN"
CHANNELS_SECOND = {"u": "B E L", "delta": "B E L", "z": "B E L", "A": "E N", "D": "E", "delta_bias": "E"}
RATES = {2: "E N", 3: "B N L", 4: "B G N L"}  # of B and C, by their number of dimensions
DIRECTIONAL = {"u": "K B L E", "delta": "K B L E", "A": "K E N", "B": "K B L N", "C": "K B L N", "D": "K E"}
DIRECTIONAL["delta_bias"] = "K E"

logger = logging.getLogger(__name__)
_announced: set[str] = set()


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One scan with mamba_ssm's arguments.

    Dtypes as in `directional_scan`. Complex tensors, which mamba_ssm accepts, are refused.

    Args:
        u: input, [B, E, L].
        delta: step sizes, [B, E, L].
        A: [E, N], negative.
        B: [B, N, L]; in groups [B, G, N, L], where channel e uses group e // (E / G); or [E, N], the same at every
            step.
        C: as B.
        D: skip connection, [E]; None: none.
        z: gate, [B, E, L]: the result is multiplied by silu(z); None: no gate.
        delta_bias: added to delta, [E]; None: none.
        delta_softplus: apply softplus to delta + delta_bias.
        reverse: scan from the last step to the first.
        backend: "auto" or one of `BACKENDS`.
        return_last_state: also return the state after the last step.

    Returns:
        The result [B, E, L]; with `return_last_state`, also the state [B, E, N] in the state's dtype.

    Raises:
        ModelError: shapes, dtypes or devices do not fit, or the backend is unknown.
        BackendError: the backend cannot run here.
    """
    rates = {
        name: RATES.get(x.dim(), RATES[3]) if isinstance(x, torch.Tensor) else RATES[3]
        for name, x in (("B", B), ("C", C))
    }
    sizes = _check_sizes({**CHANNELS_SECOND, **rates}, u=u, A=A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    # With [E, N], each channel has its own B or C: each channel is a group.
    groups = sizes["E"] if 2 in (B.dim(), C.dim()) else sizes.get("G", 1)
    if groups < 1 or sizes["E"] % groups or groups % sizes.get("G", 1):
        raise ModelError("E must be a multiple of the groups of B and C", got=f"E = {sizes['E']}, G = {sizes['G']}")

    def directions(x: torch.Tensor) -> torch.Tensor:
        """[B, G·n, L] to [G, B, L, n]: a group acts as a direction: channels with their own B and C."""
        return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)

    def rate(x: torch.Tensor) -> torch.Tensor:
        """B or C of any layout to [G, B, L, N]."""
        if x.dim() == 2:
            return x[:, None, None].expand(-1, sizes["B"], sizes["L"], -1)
        x = x if x.dim() == 4 else x.unsqueeze(1)
        return x.repeat_interleave(groups // x.shape[1], 1).permute(1, 0, 3, 2)

    wide = state_dtype(u, delta, A, B, C, D, delta_bias)
    u_run, delta_run, b_run = directions(u if z is None else u.to(wide)), directions(delta), rate(B)
    a_run, d_run, bias = (None if x is None else x.unflatten(0, (groups, -1)) for x in (A, D, delta_bias))
    assert a_run is not None
    y = directional_scan(
        u_run, delta_run, a_run, b_run, rate(C), d_run, bias, delta_softplus, (reverse,) * groups, backend
    )
    y = y.permute(1, 0, 3, 2).flatten(1, 2)
    if z is not None:
        y = (y * F.silu(z.to(wide))).to(u.dtype)
    if not return_last_state:
        return y
    state = last_state(u_run, delta_run, a_run, b_run, bias, delta_softplus, reverse)
    return y, state.transpose(0, 1).flatten(1, 2)


def directional_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: Sequence[bool] = (False,),
    backend: str = "auto",
) -> torch.Tensor:
    """K scans at once, channel-last.

    Dtypes may differ: the result has u's; the state is float32, or float64 if one of the tensors is.

    Args:
        u: input, [K, B, L, E].
        delta: step sizes, [K, B, L, E].
        A: [K, E, N], negative.
        B: [K, B, L, N].
        C: [K, B, L, N].
        D: skip connection, [K, E]; None: none.
        delta_bias: added to delta, [K, E]; None: none.
        delta_softplus: apply softplus to delta + delta_bias.
        reverse: for each direction, whether it runs from the last step to the first; its result is in the original
            order.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        [K, B, L, E].

    Raises:
        ModelError: shapes, dtypes or devices do not fit, or the backend is unknown.
        BackendError: the backend cannot run here.
    """
    sizes = _check_sizes(DIRECTIONAL, u=u, A=A, delta=delta, B=B, C=C, D=D, delta_bias=delta_bias)
    if len(reverse) != sizes["K"]:
        raise ModelError(
            "reverse does not fit u", got=f"{len(reverse)} values", expected=f"one for each of {sizes['K']}"
        )
    double = state_dtype(u, delta, A, B, C, D, delta_bias) == torch.float64
    if torch.compiler.is_exporting() and backend in ("auto", "reference"):
        # Few operators, and only those that every runtime knows.
        return scan_by_doubling(u, delta, A, B, C, D, delta_bias, bool(delta_softplus), [bool(b) for b in reverse])
    name = choose_backend(backend, u.device.type, double)
    scan = {"reference": scan_reference, "cpu": scan_cpu, "numba": scan_numba, "triton": scan_triton}
    return scan.get(name, _scan_mamba_ssm)(
        u, delta, A, B, C, D, delta_bias, bool(delta_softplus), [bool(backwards) for backwards in reverse]
    )


@torch.compiler.assume_constant_result  # called by the compiler while it traces, which cannot trace logs and imports
def choose_backend(backend: str, device: str, double: bool = False) -> str:
    """Choose the scan backend.

    Args:
        backend: "auto" or one of `BACKENDS`.
        device: type of the tensors' device, "cpu" or "cuda".
        double: whether one of the tensors is float64.

    Returns:
        One of `BACKENDS`.

    Raises:
        ModelError: the backend is unknown.
        BackendError: the named backend cannot run here.
    """
    asked, why = backend, "named by backend="
    if backend == "auto" and os.environ.get(VARIABLE):
        asked, why = os.environ[VARIABLE], f"named by {VARIABLE}"
    if asked not in (*BACKENDS, "auto"):
        where = f" in {VARIABLE}" if backend == "auto" else ""
        raise ModelError(
            f"unknown scan backend{where}", got=repr(asked), expected=f"one of {', '.join(BACKENDS)}, auto"
        )
    if asked == "auto":
        asked, why = _automatic(device, double)
    elif problem := _obstacle(asked, device, double):
        raise BackendError(
            f"the scan backend {asked!r}, {why}, cannot run: {problem}",
            remedy='backend="auto" chooses one that runs here; backend="reference" runs everywhere.',
        )
    if asked not in _announced:
        _announced.add(asked)
        logger.info("selective scan on %s: backend %s, %s", device, asked, why)
    return asked


def _automatic(device: str, double: bool) -> tuple[str, str]:
    if device == "cpu":
        problem = _obstacle("numba", device, double)
        if problem is None:
            return "numba", "chosen because the tensors are on a CPU"
        return "cpu", f"chosen because the tensors are on a CPU and numba does not run here: {problem}"
    problem = _obstacle("triton", device, double)
    if problem is None:
        return "triton", "chosen because it runs on this device"
    return "reference", f"chosen because triton does not run here: {problem}"


def _obstacle(name: str, device: str, double: bool) -> str | None:
    """The reason why a backend cannot run on tensors of this device; None if it can."""
    if name in ("cpu", "numba") and device != "cpu":
        return f"the tensors are on {device}, not on the CPU"
    if name == "numba":
        available, why = importlib.import_module("model.ops.fused_cpu.machine").is_available()
        return None if available else why
    if name in ("triton", "mamba_ssm") and double:
        return "it computes in float32 and a tensor is float64"
    if name == "triton":
        try:
            available, why = _triton().is_available()
        except Exception as error:  # a broken Triton can fail in any way
            return f"its kernels cannot be imported ({type(error).__name__}: {error})"
        if not available:
            return why
        if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"the tensors are on {device}; move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"
    if name == "mamba_ssm":
        if device != "cuda":
            return f"the tensors are on {device}, and mamba-ssm needs a GPU"
        try:
            _mamba_ssm()
        except Exception as error:  # builds for another torch or driver fail in many ways
            return (
                f"mamba_ssm cannot be imported ({type(error).__name__}: {error}); pip install 'token-labeling[mamba]'"
            )
    return None


def _triton() -> ModuleType:
    return importlib.import_module("model.ops.scan_triton")


def _mamba_ssm() -> Callable[..., torch.Tensor]:
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def _scan_mamba_ssm(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> torch.Tensor:
    """Call mamba_ssm, which takes [B, E, L], one direction at a time, and one dtype for u, delta, B and C."""
    outputs = []
    for k, backwards in enumerate(reverse):
        steps = [(x[k].flip(1) if backwards else x[k]).to(u.dtype).mT.contiguous() for x in (u, delta, B, C)]
        rates = [None if x is None else x[k].float().contiguous() for x in (A, D, delta_bias)]
        y = _mamba_ssm()(
            *steps[:2], rates[0], *steps[2:], rates[1], delta_bias=rates[2], delta_softplus=delta_softplus
        ).mT
        outputs.append(y.flip(1) if backwards else y)
    return torch.stack(outputs)


def _check_sizes(layout: dict[str, str], **tensors: torch.Tensor | None) -> dict[str, int]:
    """The size of each letter of the layout. Raises ModelError if the tensors, in this order, do not agree."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor is None and name in ("D", "z", "delta_bias"):
            continue
        axes = layout[name].split()
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{name} is not a tensor", got=type(tensor).__name__, expected=_shape_text(axes, sizes))
        fits = tensor.dim() == len(axes)
        if not fits or any(sizes.setdefault(axis, tensor.shape[i]) != tensor.shape[i] for i, axis in enumerate(axes)):
            shape = _shape_text(axes, sizes)
            raise ModelError(f"the shape of {name} does not fit", got=list(tensor.shape), expected=shape)
        if not tensor.is_floating_point():
            raise ModelError(f"the dtype of {name} does not fit", got=tensor.dtype, expected="a floating-point dtype")
        if tensors["u"] is not None and tensor.device != tensors["u"].device:
            raise ModelError(f"{name} is on another device than u", got=tensor.device, expected=tensors["u"].device)
    if not sizes["L"] or not sizes["N"]:
        raise ModelError("a scan needs at least one step and one state", got=f"L = {sizes['L']}, N = {sizes['N']}")
    return sizes


def _shape_text(axes: list[str], sizes: dict[str, int]) -> str:
    """For messages only: a size in a string is no longer dynamic to the compiler."""
    return f"[{', '.join(f'{axis} = {sizes[axis]}' if axis in sizes else axis for axis in axes)}]"
