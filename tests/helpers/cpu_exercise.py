"""All of megatron-core that a run on the CPU touches, without some of the shim's patches: python cpu_exercise.py FOLDER [PATCH...]."""

from __future__ import annotations

import sys
from pathlib import Path

from hunyuan_pretrain.runtime import cpu_megatron


def main(folder: Path) -> None:
    """Train, evaluate, save, load and train again in fp32 and bf16, with and without the distributed optimizer, overlap and offload of
    the optimizer's state; one rank."""
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train.loop import train
    from tests.helpers.runs import experiment_fields, metrics

    assert "torch._inductor.lowering" not in sys.modules, "torch's compiler was loaded, which every process of a run would wait for"

    corpus, losses = folder / "data", []
    layouts = (
        ("fp32", 0.0, {"use_distributed_optimizer": False}),
        ("bf16", 0.5, {"overlap_grad_reduce": True, "overlap_param_gather": True, "recompute": "cla_group"}),
    )
    for dtype, offloaded, parallel in layouts:
        run_dir = folder / "runs" / f"{dtype}_{'_'.join(sys.argv[2:]) or 'complete'}"
        fields = experiment_fields(corpus, run_dir, steps=2, precision={"dtype": dtype}, parallel=parallel, model__num_layers=2)
        fields["evaluation"] = {"data": str(corpus / "heldout"), "max_sequences": 2}
        fields["optimizer"]["cpu_offload_fraction"] = offloaded
        fields["checkpoint"] = {"save_every_steps": 1}
        train(Experiment.model_validate(fields))
        # again from the checkpoint after step 1
        (run_dir / "checkpoints" / "step_0000002").rename(run_dir / "checkpoints" / "away")
        train(Experiment.model_validate(fields))
        losses += [record["loss"] for record in metrics(run_dir) if "loss" in record]
    assert len(losses) == 4, losses


if __name__ == "__main__":
    assert cpu_megatron.install(leave_out=sys.argv[2:])
    main(Path(sys.argv[1]))
