"""Memory that is freed stays for the next batch, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
ROOT = Path(__file__).parents[1]
FAULTS_OF_LATER_STEPS = """
import resource, sys, torch
from labeler.base.freed_memory import keep_freed_memory
net = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
images = torch.randn(8, 16, 256, 256)  # 34 MB, as are the features between the layers
def step():
    net(images).sum().backward()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""
HELD_AFTER_BEING_FREED = """
import os, torch
from labeler.base.freed_memory import freed_memory_kept
def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')
with freed_memory_kept():
    tensors = [torch.ones(4 << 20) for _ in range(16)]  # 16 MiB each
    on_top = torch.ones(1000)  # what lies above them keeps the heap from shrinking by itself
    del tensors
    within = held()
print(within - held())
"""


def in_a_process_of_its_own(program: str, *arguments: str, **variables: str) -> int:
    command = [sys.executable, "-c", program, *arguments]
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=unset | variables)
    return int(done.stdout)


def faults(how: str, **variables: str) -> int:
    return in_a_process_of_its_own(FAULTS_OF_LATER_STEPS, how, **variables)


@pytest.fixture(scope="module")
def default_faults():
    found = faults("default")
    if found < 10_000:
        pytest.skip("here freed memory is kept anyway: another malloc, or huge pages")
    return found


def test_later_steps_get_the_memory_that_was_freed(default_faults):
    assert faults("kept") < default_faults / 20


def test_what_was_kept_for_a_while_goes_back_to_the_system(default_faults):
    assert in_a_process_of_its_own(HELD_AFTER_BEING_FREED) > 200 << 20


@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_what_a_user_has_set_for_malloc_stays(default_faults, variable):
    assert faults("kept", **variable) > default_faults / 20
