"""The memory of an export does not grow with the number of layers: measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.random_checkpoint import STEP, weights_of, write_random_run
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.slow

WIDTH = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_hidden_size": 704,
    "moe_ffn_hidden_size": 704,
    "num_moe_experts": 8,
}

SCRIPT = """
import json, resource, sys
from hunyuan_pretrain.runtime.environment import prepare
prepare(None)
from pathlib import Path
from hunyuan_pretrain.checkpoint import certificate
from hunyuan_pretrain.checkpoint.export_run import export_run
certificate.free_memory_bytes = lambda: 1_000  # nothing is loaded as a whole
found = export_run(Path(sys.argv[1]), Path(sys.argv[2]), dtype="bf16", processes=1)
print(json.dumps({
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "whole": found["loaded_as_a_whole"],
    "layers": len(found["layers"]["checks"]),
}))
"""


def export(run_dir: Path, output: Path) -> dict[str, int]:
    # oneDNN keeps a program for each shape that it has multiplied, by default 1,024: the more layers, the more numbers
    # of tokens of an expert have occurred. That has an end, and is not what is measured here.
    few_programs = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    environment = os.environ | few_programs | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run_dir), str(output)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_an_export_of_24_layers_takes_the_memory_of_one_of_4(tmp_path: Path) -> None:
    """A difference of less than three layers in fp32, of a model of 1 GB."""
    peaks = {}
    for layers in (4, 24):
        run_dir = write_random_run(tmp_path / f"run_{layers}", {"num_layers": layers, **WIDTH})
        found = export(run_dir, tmp_path / f"out_{layers}")
        assert found["layers"] == layers
        assert str(found["whole"]).startswith("no")
        peaks[layers] = found["peak"]
    weights = weights_of(run_dir / f"checkpoints/step_{STEP:07d}")
    sizes = {name: weights.spec(name).nbytes for name in weights}
    assert sum(sizes.values()) > 950_000_000
    layer = sum(size for name, size in sizes.items() if name.startswith("decoder.layers.7."))
    assert peaks[24] - peaks[4] < 3 * layer, (peaks, layer)
