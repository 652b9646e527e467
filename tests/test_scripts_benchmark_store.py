"""What the store promises about size, truth and speed, measured by its own benchmark on fewer images."""

from __future__ import annotations

from scripts.benchmark_store import SETTINGS, measure, read_speed


def test_the_store_is_smaller_truer_and_faster_than_one_file_per_image(tmp_path):
    (reference, ours), sure = measure(300, 6.0, tmp_path, SETTINGS[:1])
    assert 0.35 < sure < 0.5, "the maps are neither trivial nor noise"
    assert reference["bytes"] > 7_500
    assert ours["bytes"] <= 2_200
    assert ours["kl"] <= 0.70 * reference["kl"]
    assert ours["top1"] >= 0.99
    times = read_speed(tmp_path, 300, rows=300, repeats=3)
    assert times["torch.load per image"] >= 5 * times['store, cache="ram"']
