"""Memory that is freed stays for the next batch, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS_OF_A_SECOND_TENSOR = """
import resource, sys, torch
from labeler.freed_memory import freed_memory_kept, keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
if sys.argv[1] == "for a while":
    with freed_memory_kept():
        torch.ones(25_000_000)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(25_000_000)  # 100 MB, freed at once
before = faults()
torch.ones(25_000_000)
print(faults() - before)
"""


def faults(how: str, **variables: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_A_SECOND_TENSOR, how]
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=unset | variables)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
def test_the_next_steps_tensors_get_the_memory_that_was_freed():
    pages = 100_000_000 // os.sysconf("SC_PAGE_SIZE")
    if faults("default") < pages / 2:
        pytest.skip("here freed memory is kept anyway: another malloc, or huge pages")
    assert faults("kept") < pages / 100
    assert faults("for a while") > pages / 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_what_a_user_has_set_for_malloc_stays(variable):
    assert faults("kept", **variable) == pytest.approx(faults("default", **variable), rel=0.05)
