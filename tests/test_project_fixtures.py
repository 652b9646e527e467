"""The slim numbers that tests compare with: small, true to the full ones, and not blind."""

from __future__ import annotations

import pytest
import torch
from fixtures import FULL, SLIM, Sample, about, all_keys, close, drawn, tensors

NAMES = sorted(path.stem for path in SLIM.glob("*.xz") if not path.name.endswith(".json.xz"))


def test_all_fixtures_take_at_most_three_megabytes():
    assert sum(path.stat().st_size for path in SLIM.rglob("*") if path.is_file()) < 3_000_000
    assert len(NAMES) == 9
    assert {"demansia_tiny", "demansia2_tiny", "vim_base", "lvvit_l", "mlla_t", "mamba_vision_T"} <= all_keys().keys()
    for name in NAMES:
        assert about(name)["source"], name  # every number says which commit of which repository it is from


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_draws_are_torchs_own(kind):
    torch.manual_seed(7)
    torch.rand(5)
    own = torch.randn(64) if kind == "normal" else torch.empty(64).uniform_(-1, 1)
    found = torch.from_numpy(drawn({"kind": kind, "seed": 7, "start": 5, "scale": 1.0}, 64))
    assert (own - found).abs().max() < 1e-6


def test_slim_numbers_are_the_full_ones():
    if not FULL.is_dir():
        pytest.skip(f"the full numbers are not at hand ({FULL}); the slim ones are compared with in any case")
    for name in NAMES:
        full, rounded = tensors(name, "full"), about(name).get("rounded", 0)
        for key, value in tensors(name).items():
            if isinstance(value, Sample):
                close(full[key], value, 1e-15)
            else:
                torch.testing.assert_close(value, full[key], rtol=0, atol=rounded, msg=f"{name} {key}")


def test_a_sample_sees_any_wrong_value_and_any_wrong_order():
    torch.manual_seed(0)
    whole = torch.randn(40, 50)
    sample = Sample.of(whole, 48)
    close(whole, sample, 1e-7)
    for place in range(0, 2000, 7):
        wrong = whole.clone()
        wrong.view(-1)[place] += 0.1
        with pytest.raises(AssertionError):
            close(wrong, sample, 1e-5)
    with pytest.raises(AssertionError):
        close(whole.roll(sample.step), sample, 1e-5)
    with pytest.raises(AssertionError):
        close(whole.mT, sample, 1e-5)
