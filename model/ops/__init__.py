"""Operators of the models, each with a plain reference and faster backends."""

from model.ops.scan_reference import scan_by_doubling, scan_reference
from model.ops.selective_scan import BACKENDS, choose_backend, directional_scan, selective_scan
from model.ops.ssd import ssd_chunked, ssd_reference, ssd_scan, trapezoid_reference, trapezoid_ssd

__all__ = [
    "BACKENDS",
    "choose_backend",
    "directional_scan",
    "scan_by_doubling",
    "scan_reference",
    "selective_scan",
    "ssd_chunked",
    "ssd_reference",
    "ssd_scan",
    "trapezoid_reference",
    "trapezoid_ssd",
]
