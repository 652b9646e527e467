"""What the store promises about size, truth and speed, measured by its own benchmark on fewer images."""

from __future__ import annotations

import statistics

from scripts.benchmark.store_truth import LOAD, RAM, RIVAL, SETTINGS, measure_level, read_speed


def test_the_store_is_smaller_truer_and_faster_than_one_file_per_image(tmp_path):
    level, ours = measure_level(300, 6.0, tmp_path, SETTINGS[:1]), str(SETTINGS[0])
    assert 0.35 < level.sure < 0.5, "the maps are neither trivial nor noise"
    assert level.bytes[RIVAL] > 7_500
    assert level.bytes[ours] <= 2_200
    assert level.kl[ours] <= 0.70 * level.kl[RIVAL]
    assert level.top1[ours] >= 0.99
    times = read_speed(tmp_path, 300, rows=300, rounds=3).values
    assert statistics.median(times[LOAD]) >= 5 * statistics.median(times[RAM])
