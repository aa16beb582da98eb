import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading, torch
from ssd.memory import keep_memory
for most in sys.argv[1:]:
    assert keep_memory(int(most) or None)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        # Of 46 MB each.
        thread = threading.Thread(target=lambda: [torch.ones(8, 64, 150, 150) for _ in range(4)])
        thread.start()
        thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments):
    """Pages that the system clears for blocks that a thread takes and frees, once there were some."""
    command = [sys.executable, "-c", FAULTS, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize("most", [0, 256 << 20], ids=["all", "some"])
def test_memory_that_is_kept_is_not_cleared_again(most):
    assert faults(most) < faults() / 2
