"""Seconds of processor time that importing the config loader adds to a bare interpreter; the goal is 0.2.

python tests/benchmarks/config_import.py
"""

from __future__ import annotations

import os
import subprocess
import sys


def seconds(code: str) -> float:
    """Minimum processor time of several processes that run `code`."""
    times = []
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code])
        _, _, usage = os.wait4(process.pid, 0)
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)


if __name__ == "__main__":
    bare = seconds("pass")
    print(
        f"import hunyuan_pretrain.config.load: {seconds('import hunyuan_pretrain.config.load') - bare:.3f} s "
        f"over {bare:.3f} s"
    )
