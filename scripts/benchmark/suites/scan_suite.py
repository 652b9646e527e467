"""The selective scan and the mixer around it, forward and backward, against plain compositions and the limit.

Float32 on a CPU, bfloat16 inputs on a GPU; both directions; DeMansia Tiny's sizes. All sides get the same inputs. On a
CPU malloc keeps freed memory on all sides.

- unbound: computes decays and inputs of all steps at once, then loops over their `unbind`, both directions together.
- stepwise: `scan_reference`, which computes the decay of each step in the loop.
- indexed: as unbound, but loops over `a[:, t]`, whose backward fills a tensor of the size of `a` in every step.

Legend: K directions, B batch, L length, D model width, E inner width, N state size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from labeler.base.freed_memory import freed_memory_kept
from model.mixers import BidirectionalMamba
from model.ops import choose_backend, directional_scan, scan_reference
from scripts.benchmark.inputs.stock_model import StockMixer, has_mamba_ssm, our_scan, scan_in_use
from scripts.benchmark.limits import Limits, scan_limit
from scripts.benchmark.measure import KEPT, Case, Options, Result, milliseconds, note_of, take_turns

REVERSE = (False, True)
WIDTH, STATES, LENGTH = 384, 16, 197
Scan = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def ours(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return directional_scan(*inputs, True, REVERSE)


def in_torchs_operators(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return directional_scan(*inputs, True, REVERSE, "cpu")


def through_mamba_ssm(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return directional_scan(*inputs, True, REVERSE, "mamba_ssm")


def stepwise(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return scan_reference(*inputs, True, REVERSE)


def unbound(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return plain(inputs, lambda x: x.unbind(1))


def indexed(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return plain(inputs, lambda x: [x[:, t] for t in range(x.shape[1])])


def plain(inputs: Sequence[torch.Tensor], steps: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> torch.Tensor:
    """Scans with all decays computed at once; `steps` splits [K·B, L, E, N] into its steps."""
    u, delta, A, B, C, D, delta_bias = (x.float() for x in inputs)
    u, delta, B, C = (torch.stack([x[0], x[1].flip(1)]) for x in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias[:, None, None])
    a = torch.exp(dt.unsqueeze(-1) * A[:, None, None]).flatten(0, 1)
    x = ((dt * u).unsqueeze(-1) * B.unsqueeze(-2)).flatten(0, 1)
    h, states = torch.zeros_like(a[:, 0]), []
    for a_t, x_t in zip(steps(a), steps(x), strict=True):
        h = a_t * h + x_t
        states.append(h)
    y = (torch.stack(states, 1) @ C.flatten(0, 1).unsqueeze(-1)).view_as(u) + D[:, None, None] * u
    return torch.stack([y[0], y[1].flip(1)])


def make_inputs(batch: int, device: str) -> list[torch.Tensor]:
    """Makes inputs as in a new model: A = −1 … −N, step sizes around 0.01; u, delta, B and C in bfloat16 on a GPU."""
    torch.manual_seed(0)
    wide = torch.bfloat16 if device == "cuda" else torch.float32
    u, delta = torch.randn(2, 2, batch, LENGTH, WIDTH, device=device).to(wide)
    b, c = torch.randn(2, 2, batch, LENGTH, STATES, device=device).to(wide)
    a = -torch.arange(1, STATES + 1.0, device=device).expand(2, WIDTH, STATES)
    skip, bias = torch.ones(2, WIDTH, device=device), torch.full((2, WIDTH), -4.6, device=device)
    return [x.detach().requires_grad_() for x in (u, delta, a.clone(), b, c, skip, bias)]


def gradients(function: Callable, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.autograd.grad(function(inputs), inputs, weight)


def run(options: Options) -> Result:
    note = note_of(our_scan(options.device), KEPT[options.device])
    limits = Limits.measured(options.device)
    batch = 8 if options.device == "cpu" else 64
    with freed_memory_kept(options.device == "cpu"):
        cases = [scan_case(options, limits, batch, note), *indexed_case(options, batch, note)]
        return Result([*cases, mixer_case(options, batch, note)])


def scan_case(options: Options, limits: Limits, batch: int, note: str) -> Case:
    inputs = make_inputs(batch, options.device)
    weight = torch.randn_like(inputs[0])
    rivals: dict[str, Scan] = {"loop over unbound steps, autograd": unbound, "reference, step by step": stepwise}
    if options.device == "cuda" and has_mamba_ssm():
        rivals["mamba_ssm, with our flips and transposes"] = through_mamba_ssm
    compiled = options.device == "cpu" and choose_backend("auto", "cpu") == "numba"
    if compiled:
        rivals["backend cpu, in torch's operators"] = in_torchs_operators
    expected, tolerance = ours(inputs).float(), 1e-4 if options.device == "cpu" else 2e-2
    for scan in rivals.values():
        torch.testing.assert_close(scan(inputs).float(), expected, rtol=tolerance, atol=tolerance)
    sides = {
        name: milliseconds(lambda scan=scan: gradients(scan, inputs, weight), options.device, options.calls)
        for name, scan in {"scan, this project": ours, **rivals}.items()
    }
    found = take_turns(sides, options.rounds(9))
    limit = scan_limit(limits, 2 * batch * LENGTH * WIDTH * STATES, sum(x.nbytes for x in inputs))
    found["limit"] = [limit * 1e3] * len(next(iter(found.values())))
    times = 12 if compiled else 1.3
    sought = {"loop over unbound steps, autograd": times} if options.device == "cpu" else {"limit": 1 / 2.5}
    name = f"scan, forward and backward, two directions, B {batch}, L {LENGTH}, E {WIDTH}, N {STATES}"
    return Case(name, "ms", found, sought=sought, note=note_of(f"limit: {limits.text()}", note))


def indexed_case(options: Options, batch: int, note: str) -> list[Case]:
    if options.device != "cpu":
        return []
    inputs = make_inputs(batch, options.device)
    weight = torch.randn_like(inputs[0])
    rival = "loop over indexed steps, autograd"
    sides = {
        name: milliseconds(lambda scan=scan: gradients(scan, inputs, weight))
        for name, scan in {"scan, this project": ours, rival: indexed}.items()
    }
    # A round takes half a minute, and the ratio is far from the sought one; `scan_case` has compared the results.
    found = take_turns(sides, 1 if options.quick else 2, warmups=0)
    return [Case(f"the same against indexed steps, B {batch}", "ms", found, sought={rival: 20}, note=note)]


def mixer_case(options: Options, batch: int, note: str) -> Case:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(WIDTH // 2).to(options.device)
    stock = StockMixer(mixer)
    hidden = torch.randn(batch, LENGTH, WIDTH // 2, device=options.device, requires_grad=True)
    wanted = [hidden, *mixer.parameters()]
    with torch.no_grad():
        torch.testing.assert_close(stock(hidden), mixer(hidden), rtol=1e-3, atol=1e-4)

    def once(function: torch.nn.Module) -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = function(hidden).float().square().mean()
        torch.autograd.grad(loss, wanted)

    modules = {
        "mixer, this project": mixer,
        f"stock operators with flips, {scan_in_use(options.device)}": stock,
    }
    sides = {
        name: milliseconds(lambda module=module: once(module), options.device, options.calls)
        for name, module in modules.items()
    }
    name = f"bidirectional mixer, forward and backward, B {batch}, L {LENGTH}, D {WIDTH // 2}"
    return Case(name, "ms", take_turns(sides, options.rounds(9)), note=note)
