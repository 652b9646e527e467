"""A network as an ExecuTorch file, with XNNPACK's kernels, and its run. executorch is imported here alone."""

from __future__ import annotations

from pathlib import Path

import torch

from train.export.program import Runner, silence

MOST = 16  # images: memory is planned for the largest batch


def write_executorch(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph for ExecuTorch's runtime."""
    with silence():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        # The usual pass plans memory for the traced batch alone.
        config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
        path.write_bytes(lowered.to_executorch(config).buffer)


def load_executorch(path: Path) -> Runner:
    """Load such a file."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: torch.Tensor) -> torch.Tensor:
        return method.execute([images.contiguous()])[0].clone()

    return run
