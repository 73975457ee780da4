"""Layouts in one line: refused with a clear message, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.layouts import layout_experiment
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.runs import ROOT, experiment_fields, write_experiment


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(experiment_fields(Path("corpus"), Path("run"), **changes))


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (
            "ep=2",
            r"ep=2: the 2 expert ranks are part of tp \* cp \* dp, which is 1 because the layout has no dp "
            r"\(write dp=2,ep=2\)",
        ),
        ("tp=2,ep=2,etp=2", r"the 4 expert ranks.*which is 2.*\(write dp=2,tp=2,ep=2,etp=2\)"),
        ("xp=2", r"xp: unknown part of a layout \(use tp, pp, "),
        ("tp=two", r"tp=two: not a number of at least 1"),
        ("recompute=gelu", r"recompute=gelu: no such choice \(use none, swiglu, norms, swiglu\+norms, selective, "),
        ("offload=1", r"cpu_offloading_num_layers=1: a CLA group of 2 layers goes to the host as a whole"),
    ],
)
def test_an_impossible_layout_is_refused_with_one_that_works(layout, says):
    with pytest.raises(ConfigError, match=says):
        layout_experiment(experiment(), layout, None, Path("run"))


def test_recompute_and_offloading_may_be_part_of_a_layout():
    mine = experiment(parallel={"recompute": "selective", "cpu_offloading_num_layers": 2})
    for layout, recompute, layers in (
        ("dp=1", "selective", 2),
        ("recompute=swiglu+norms,offload=0", "swiglu+norms", 0),
    ):
        made = layout_experiment(mine, layout, None, Path("run"))[0].parallel
        assert (made.recompute, made.cpu_offloading_num_layers) == (recompute, layers)


@pytest.mark.parametrize(("layout", "stays"), [("dp=2,ep=2", True), ("dp=2", False), ("tp=2,dp=2,ep=2", False)])
def test_the_overlap_of_the_shared_expert_stays_only_where_it_is_legal(layout, stays):
    parallel = {"expert_model_parallel_size": 2, "overlap_shared_expert": True}
    found, _ = layout_experiment(experiment(parallel=parallel), layout, None, Path("run"))
    assert found.parallel.overlap_shared_expert is stays


def test_precision_and_engine_are_the_requested_ones():
    mine = experiment(
        model__moe_ffn_hidden_size=48,
        precision={"dtype": "bf16", "fp8_recipe": "tensorwise"},
        runtime={"transformer_engine": "required"},
    )
    made = {name: layout_experiment(mine, "dp=2", None, Path("run"), name)[0] for name in ("fp32", "bf16", "fp8")}
    assert [found.precision.dtype for found in made.values()] == ["fp32", "bf16", "bf16"]
    assert [found.precision.fp8_recipe for found in made.values()] == [None, None, "tensorwise"]
    assert {found.runtime.transformer_engine for found in made.values()} == {"never"}, "whatever the experiment says"
    assert layout_experiment(mine, "dp=2", None, Path("run"), "bf16", "te")[0].runtime.transformer_engine == "required"
    with pytest.raises(
        ConfigError,
        match=r"precision\.fp8_recipe=null: the experiment has no recipe \(add precision\.fp8_recipe=blockwise",
    ):
        layout_experiment(experiment(), "dp=2", None, Path("run"), "fp8")


def test_a_comparison_in_fp32_leaves_out_what_bf16_weights_need():
    split = {"lr": 1e-3, "use_precision_aware_optimizer": True, "exp_avg_sq_dtype": "bf16"}
    mine = experiment(precision={"dtype": "bf16"}, optimizer=split)
    fp32, bf16 = (layout_experiment(mine, "dp=2", None, Path("run"), name)[0].optimizer for name in ("fp32", "bf16"))
    assert (fp32.use_precision_aware_optimizer, fp32.exp_avg_sq_dtype) == (False, "fp32")
    assert (bf16.use_precision_aware_optimizer, bf16.exp_avg_sq_dtype) == (True, "bf16")


def test_a_bad_layout_is_reported_before_torch_is_imported(tmp_path):
    path = write_experiment(tmp_path / "x.yaml", experiment_fields(tmp_path, tmp_path / "run"))
    code = "import sys; sys.modules['torch'] = None; from hunyuan_pretrain.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "parity", str(path), "--layout", "ep=2"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "layout ep=2: 1 problem"), done.stderr
