"""Memory that is freed stays for the next batch, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS_OF_LATER_STEPS = """
import resource, sys, torch
from labeler.freed_memory import freed_memory_kept, keep_freed_memory
net = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
images = torch.randn(8, 16, 256, 256)  # 34 MB, as are the features between the layers
def step():
    net(images).sum().backward()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "kept":
    keep_freed_memory()
if sys.argv[1] == "for a while":
    with freed_memory_kept():
        step()
for _ in range(3):
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


def faults(how: str, **variables: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_LATER_STEPS, how]
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=unset | variables)
    return int(done.stdout)


@pytest.fixture(scope="module")
def default_faults():
    found = faults("default")
    if found < 10_000:
        pytest.skip("here freed memory is kept anyway: another malloc, or huge pages")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
def test_later_steps_get_the_memory_that_was_freed(default_faults):
    assert faults("kept") < default_faults / 20
    assert faults("for a while") > default_faults / 20, "it was to be given back again"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_what_a_user_has_set_for_malloc_stays(default_faults, variable):
    assert faults("kept", **variable) > default_faults / 2
