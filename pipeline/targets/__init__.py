"""Targets from label maps: rows of the store, cropped to the token grid of each view.

The label crop: `crop_score_maps` in torch's operators, `crop_stored_rows` as the loader runs it on a CPU
(kernels in `pipeline.compiled.crop_kernels`), `crop_reference` one token after another.
"""
