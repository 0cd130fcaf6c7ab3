"""The C library keeps freed memory: a step's page faults are those of its first run."""

import platform
import subprocess
import sys

CHURN = """
import resource, torch
from kdbench.engine.device import keep_freed_memory

def churn(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        held = [torch.ones(1_000_000) for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory(), churn(3), churn(10))
"""


def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True)
    kept, first, later = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    if kept == "True":  # 4 MB are 977 pages, each faulted in once and not 10 times
        assert int(first) > 900 and int(later) < 100
