"""A network as an ExecuTorch file, with XNNPACK's kernels, and its run. executorch is imported here alone.

It takes one image at a time: XNNPACK's convolutions keep the batch that they were traced with (ExecuTorch 1.5).
"""

from __future__ import annotations

from pathlib import Path

import torch

from train.export.program import Runner, silence


def write_executorch(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph for ExecuTorch's runtime."""
    with silence():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def load_executorch(path: Path) -> Runner:
    """Load such a file."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([method.execute([image.contiguous()])[0].clone() for image in images.split(1)])

    return run
