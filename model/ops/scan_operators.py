"""The hand-written scans as torch operators, for torch.compile, autograd, `torch.func` and flop counters.

Legend: K directions, B batch, L length, E inner width, N state size, V samples of `torch.vmap`. u, delta, y
[K, B, L, E]; A [K, E, N]; B, C [K, B, L, N]; D, delta_bias [K, E] or None; reverse  K times 0 or 1; keep  whether
the states that the backward pass needs are returned, too.

token_labeling::scan_cpu, scan_numba, scan_triton and their `_backward` are opaque to compilers and tracers. Inside
transforms of `torch.func`, where custom operators cannot be differentiated, an autograd.Function replaces them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from labeler.base.errors import ModelError
from model.ops import scan_cpu as cpu_scan
from model.ops.scan_reference import state_dtype

# Per step, channel and state: decay times state, plus input times B; then times C into the output. Products and sums
# count separately, as in flop counters.
FLOPS_PER_STATE = 6
NAMESPACE = "token_labeling"  # of the operators
TENSORS = 7  # u, delta, A, B, C, D, delta_bias


def _triton_scan() -> ModuleType:
    return importlib.import_module("model.ops.scan_triton")


def _saved_cpu(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    return u.new_empty(cpu_scan.saved_shape(u, A), dtype=state_dtype(u, delta, A, *rest))


def _numba_scan() -> ModuleType:
    return importlib.import_module("model.ops.fused_cpu.scan")


def _saved_numba(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    return u.new_empty(_numba_scan().saved_shape(u, A), dtype=state_dtype(u, delta, A, *rest))


def _saved_triton(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    directions, batch, length, width = u.shape
    chunks = (length + _triton_scan().CHUNK - 1) // _triton_scan().CHUNK
    return u.new_empty(directions, batch, chunks, A.shape[2], width, dtype=torch.float32)


def transforms_are_active() -> bool:
    """Whether this call is inside `torch.func.grad`, `vmap` or their like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def scan_flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any) -> int:
    """Flops of a forward pass over tensors of these shapes."""
    directions, batch, length, width = u
    return FLOPS_PER_STATE * directions * batch * length * width * A[2]


def _register(
    name: str,
    implementation: Callable[[], Any],
    saved_like: Callable[..., torch.Tensor],
    saved_directions: int,
    can_forget: bool = False,
) -> Callable[..., torch.Tensor]:
    """Register scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse) -> y as a torch operator.

    `implementation` returns the module with `forward` and `backward`; it is called at the first use, so that
    registering imports no vendor library.
    `saved_directions` is the dimension of K in the tensor that `forward` saves; chunks are in dimension 2 where
    `forward` `can_forget` the states, if no gradient is wanted.
    """

    @torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
    def operator(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        delta_softplus: bool,
        reverse: Sequence[int],
        keep: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"keep": keep} if can_forget else {}
        backwards = tuple(bool(one) for one in reverse)
        return implementation().forward(u, delta, A, B, C, D, delta_bias, delta_softplus, backwards, **options)

    @torch.library.custom_op(f"{NAMESPACE}::{name}_backward", mutates_args=())
    def operator_backward(
        grad_y: torch.Tensor,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        saved: torch.Tensor,
        delta_softplus: bool,
        reverse: Sequence[int],
    ) -> list[torch.Tensor]:
        backwards = tuple(bool(one) for one in reverse)
        gradients = implementation().backward(
            grad_y, u, delta, A, B, C, D, delta_bias, saved, delta_softplus, backwards
        )
        return [gradient for gradient in gradients if gradient is not None]  # an operator cannot return None

    @operator.register_fake
    def fake(u: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        saved = saved_like(u, *rest[: TENSORS - 1])
        keep = rest[TENSORS + 1] if len(rest) > TENSORS + 1 else True
        return y, saved if keep or not can_forget else saved.new_empty(*saved.shape[:2], 0, *saved.shape[3:])

    @operator_backward.register_fake
    def fake_backward(grad_y: torch.Tensor, *tensors: Any) -> list[torch.Tensor]:
        like = torch.contiguous_format
        return [torch.empty_like(tensor, memory_format=like) for tensor in tensors[:TENSORS] if tensor is not None]

    operator.register_autograd(lambda ctx, grad_y, _: _gradients(ctx, grad_y, operator_backward), setup_context=_keep)
    operator_backward.register_autograd(_no_second_derivatives)

    transformed = _for_transforms(operator, operator_backward, saved_directions)

    def flops_backward(grad_shape: Sequence[int], *shapes: Any, **_: Any) -> int:
        return 2 * scan_flops(*shapes)

    operators = getattr(torch.ops, NAMESPACE)
    register_flop_formula(getattr(operators, name))(scan_flops)
    register_flop_formula(getattr(operators, f"{name}_backward"))(flops_backward)

    def scan(*inputs: Any) -> torch.Tensor:
        *tensors, delta_softplus, reverse = inputs
        given = (*tensors, bool(delta_softplus), tuple(int(one) for one in reverse))
        if transforms_are_active():
            return transformed(*given)[0]
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        # A traced graph keeps them always, as it is the same with and without gradients.
        return operator(*given, wanted or not can_forget or torch.jit.is_tracing())[0]

    return scan


def _for_transforms(
    operator: Callable[..., Any], operator_backward: Callable[..., Any], saved_directions: int
) -> Callable[..., Any]:
    """The same scan as `operator`, for `torch.func.grad`, `vmap` and similar transforms."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            _keep(ctx, inputs, output)
            ctx.mark_non_differentiable(output[1])

        @staticmethod
        def backward(ctx: Any, grad_y: torch.Tensor | None, _: torch.Tensor | None) -> tuple:
            return _gradients(ctx, grad_y, ScanBackward.apply)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
            """Samples become directions, each with its own parameters."""
            *tensors, delta_softplus, reverse = inputs
            folded = [_fold(x, dim, info.batch_size, 0) for x, dim in zip(tensors, in_dims, strict=False)]
            y, saved = Scan.apply(*folded, delta_softplus, tuple(reverse) * info.batch_size)
            shape = (info.batch_size, len(reverse))
            return (y.unflatten(0, shape), saved.unflatten(saved_directions, shape)), (0, saved_directions)

    class ScanBackward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(operator_backward(*inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None: ...

        backward = staticmethod(_no_second_derivatives)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
            *tensors, delta_softplus, reverse = inputs
            given = zip(tensors, in_dims, [0] * (1 + TENSORS) + [saved_directions], strict=False)
            folded = [_fold(x, dim, info.batch_size, k_dim) for x, dim, k_dim in given]
            gradients = ScanBackward.apply(*folded, delta_softplus, tuple(reverse) * info.batch_size)
            shape = (info.batch_size, len(reverse))
            return tuple(gradient.unflatten(0, shape) for gradient in gradients), (0,) * len(gradients)

    return Scan.apply


def _keep(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensors = inputs[:TENSORS]
    ctx.delta_softplus, ctx.reverse = inputs[TENSORS : TENSORS + 2]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # `saved` has no gradient: no zeros of its size


def _gradients(ctx: Any, grad_y: torch.Tensor | None, run: Callable[..., Sequence[torch.Tensor]]) -> tuple:
    """Gradients of the tensors that `_keep` saved, None for those that were None."""
    if grad_y is None:
        return (None,) * ctx.inputs
    *tensors, saved = ctx.saved_tensors
    gradients = iter(run(grad_y, *tensors, saved, ctx.delta_softplus, ctx.reverse))
    return *(None if tensor is None else next(gradients) for tensor in tensors), *(None,) * (ctx.inputs - TENSORS)


def _fold(x: torch.Tensor | None, dim: int | None, samples: int, k_dim: int) -> torch.Tensor | None:
    """Fold V samples (in dimension `dim`; None: x is shared) into dimension `k_dim`: […, K, …] to […, V·K, …]."""
    if x is None:
        return None
    many = x.movedim(dim, k_dim) if dim is not None else torch.stack([x] * samples, k_dim)
    return many.flatten(k_dim, k_dim + 1)


def _no_second_derivatives(ctx: Any, *_: Any) -> Any:
    raise ModelError("the hand-written scans have no second derivatives", expected='a model with backend="reference"')


scan_cpu = _register("scan_cpu", lambda: cpu_scan, _saved_cpu, 1)
scan_numba = _register("scan_numba", _numba_scan, _saved_numba, 0, can_forget=True)
scan_triton = _register("scan_triton", _triton_scan, _saved_triton, 0, can_forget=True)
