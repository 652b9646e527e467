"""A network as an ONNX file, in float32 or int8, and its run in onnxruntime; both are imported here alone.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.export.program import Runner, silence

INPUT, OUTPUT = "images", "logits"
# Layers whose weights become int8. All else, as the scan with its exponentials, stays in float32.
LAYERS = ["Conv", "MatMul", "Gemm"]


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph as ONNX, with its constants folded.

    Args:
        program: the graph.
        path: the file; a second one beside it is removed again.
    """
    import onnxruntime

    raw = path.with_name(f"{path.name}.raw")
    try:
        with silence():
            exported: Any = torch.onnx.export(
                program, input_names=[INPUT], output_names=[OUTPUT], optimize=False, verbose=False
            )
            exported.save(raw, external_data=False)
        # The same standard operators, but without those that depend on no input; the exporter's own optimizer takes
        # minutes for a network of many scans.
        options = _options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    finally:
        raw.unlink(missing_ok=True)


def load_onnx(path: Path) -> Runner:
    """Load an ONNX file to run in one thread."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), _options(), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


def quantize(source: Path, path: Path, how: str, calibration: Sequence[torch.Tensor]) -> None:
    """Write the int8 form of an ONNX file.

    Args:
        source: the file in float32.
        path: the file to write.
        how: "dynamic": the ranges of activations are measured at each run; "static": on the calibration images.
        calibration: batches [B, 3, S, S] of images; only for "static".
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.left, None)
            return None if images is None else {INPUT: images.numpy()}

    common = {"weight_type": QuantType.QInt8, "per_channel": True}
    constant = {"MatMulConstBOnly": True}  # products of two activations stay in float32
    with silence():
        if how == "dynamic":
            # Convolutions, which have few weights, are slower so.
            quantize_dynamic(source, path, op_types_to_quantize=LAYERS[1:], extra_options=constant, **common)
        else:
            quantize_static(
                source, path, Batches(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
                op_types_to_quantize=LAYERS, extra_options=constant, **common,
            )  # fmt: skip


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options
