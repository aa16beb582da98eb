import platform
import subprocess
import sys

import pytest

KEEPING = """
import resource, sys, threading, torch
from ssd.memory import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        # Of 46 MB each.
        thread = threading.Thread(target=lambda: [torch.ones(8, 64, 150, 150) for _ in range(4)])
        thread.start()
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
assert keep_memory(*map(int, sys.argv[1:]))
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize("most", [[], [str(256 << 20)]], ids=["all", "some"])
def test_memory_that_is_kept_is_not_cleared_again(most):
    command = [sys.executable, "-c", KEEPING, *most]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    usual, kept = map(int, result.stdout.split())
    assert kept < usual / 10
