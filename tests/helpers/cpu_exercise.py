"""Exercise every part of megatron-core that a run on the CPU uses, first with the whole shim, then without each PATCH:
python cpu_exercise.py FOLDER [PATCH...].

Each exercise runs in a fork of this process, which has imported torch but not megatron. Prints {patch left out or "":
[status, output]}.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from hunyuan_pretrain.runtime import cpu_megatron


def packages_of_a_gpu(folder: Path) -> Path:
    """A folder with packages under Apex's names that run on no CPU, as an installation for GPUs would have."""
    packages = folder / "gpu_packages"
    for name in ("amp_C.py", "apex/__init__.py", "apex/multi_tensor_apply.py", "apex/optimizers.py"):
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("""
def fail(*args, **kwargs):
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier = FusedAdam = FusedSGD = fail
""")
    return packages


def exercise(folder: Path, left_out: str) -> None:
    """Train, evaluate, save, load and train again on one rank: fp32 and bf16, with and without the distributed
    optimizer, overlap and optimizer offload."""
    sys.path.insert(0, str(packages_of_a_gpu(folder)))
    assert cpu_megatron.install(leave_out=[left_out])
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train.loop import train
    from tests.helpers.runs import experiment_fields, metrics

    assert "torch._inductor.lowering" not in sys.modules, (
        "torch's compiler was loaded, which every process of a run would wait for"
    )

    corpus, losses = folder / "data", []
    layouts = (
        ("fp32", 0.0, {"use_distributed_optimizer": False}),
        ("bf16", 0.5, {"overlap_grad_reduce": True, "overlap_param_gather": True, "recompute": "cla_group"}),
    )
    for dtype, offloaded, parallel in layouts:
        run_dir = folder / "runs" / f"{dtype}_{left_out or 'complete'}"
        fields = experiment_fields(
            corpus, run_dir, steps=2, precision={"dtype": dtype}, parallel=parallel, model__num_layers=2
        )
        fields["evaluation"] = {"data": str(corpus / "heldout"), "max_sequences": 2}
        fields["optimizer"]["cpu_offload_fraction"] = offloaded
        fields["checkpoint"] = {"save_every_steps": 1}
        train(Experiment.model_validate(fields))
        # again from the checkpoint after step 1
        (run_dir / "checkpoints" / "step_0000002").rename(run_dir / "checkpoints" / "away")
        train(Experiment.model_validate(fields))
        losses += [record["loss"] for record in metrics(run_dir) if "loss" in record]
    assert len(losses) == 4, losses


def in_a_fork(folder: Path, left_out: str) -> tuple[int | None, str]:
    """Exit status of the exercise and everything that it printed."""
    with tempfile.TemporaryFile("w+") as said:
        process = multiprocessing.get_context("fork").Process(
            target=_in_this_fork, args=(said.fileno(), folder, left_out)
        )
        process.start()
        process.join()
        said.seek(0)
        return process.exitcode, said.read()


def _in_this_fork(said: int, folder: Path, left_out: str) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        exercise(folder, left_out)
    finally:
        sys.stdout.flush()  # before the error, which comes last


if __name__ == "__main__":
    print(json.dumps({name: in_a_fork(Path(sys.argv[1]), name) for name in ["", *sys.argv[2:]]}))
