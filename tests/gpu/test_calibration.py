"""A profile of this GPU. `make test-gpu` runs this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_calibrated_profile_is_near_the_peaks_of_the_gpu(tmp_path: Path) -> None:
    from hunyuan_pretrain.diagnostics.calibration import FP8_CAPABILITY, calibrate
    from hunyuan_pretrain.plan.hardware import load

    path = tmp_path / "mine.yaml"
    try:
        rows = calibrate(path)
    except ValueError as error:
        if "no profile comes with the project" not in str(error):
            raise
        pytest.skip(str(error))  # peaks and bandwidths of this GPU are then not known
    measured, found = {key for key, _, _ in rows}, load(path)
    expected = {f"achieved.{name}" for name in ("bf16", "memory", "elementwise", "host")}
    expected |= {"host_launch_s", "num_sms", "memory_bytes"}
    if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        expected.add("achieved.fp8")
    assert measured == expected
    for name in ("bf16", "fp8", "memory", "elementwise", "host"):
        assert 0.1 < getattr(found.achieved, name) < 1.1, name
    assert 1e-6 < found.host_launch_s < 1e-3
