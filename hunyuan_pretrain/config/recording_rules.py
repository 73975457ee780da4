"""Rules of runtime.cuda_graphs: what a recorded step cannot contain."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.attention import BACKENDS
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment


def recorded_steps_repeat_themselves(experiment: Experiment) -> Iterator[Problem]:
    """A replay launches the same kernels on the same memory: nothing in it may depend on what the host reads or
    decides, and it waits for nothing that began outside of it."""
    if not experiment.runtime.cuda_graphs:
        return
    for setting, reason, hint in _obstacles(experiment):
        yield Problem("runtime.cuda_graphs", True, f"{setting}: {reason}", f"{hint}, or this to false")


def _obstacles(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """(setting, why a step with it cannot be recorded, what to set)."""
    model, parallel, runtime = experiment.model, experiment.parallel, experiment.runtime
    if runtime.device == "cpu":
        yield "runtime.device=cpu", "CUDA graphs are of CUDA devices", "set it to auto or cuda"
    if model.moe_expert_capacity_factor is None:
        reason = "without a capacity the host reads how many rows each expert gets"
        yield "model.moe_expert_capacity_factor=null", reason, "set it to 1"
    if any(stage.is_dropless for stage in experiment.stages) and model.moe_expert_capacity_factor is not None:
        name = next(stage.name for stage in experiment.stages if stage.is_dropless)
        reason = f"without a capacity the host reads how many rows each expert gets (stage {name})"
        yield "stages.N.routing=dropless", reason, "set it to model"
    for number, stage in enumerate(experiment.stages):
        if stage.attention_dropout:
            reason = "attention with dropout does not read the boundaries of documents from memory"
            yield f"stages.{number}.attention_dropout={stage.attention_dropout}", reason, "set it to 0"
    if parallel.pipeline_model_parallel_size > 1:
        size, reason = parallel.pipeline_model_parallel_size, "an exchange between stages has never been recorded here"
        yield f"parallel.pipeline_model_parallel_size={size}", reason, "set it to 1"
    if parallel.context_parallel_size > 1:
        size, reason = parallel.context_parallel_size, "which rows a rank has depends on the documents"
        yield f"parallel.context_parallel_size={size}", reason, "set it to 1"
    if parallel.overlap_shared_expert:
        reason = "while a graph is recorded, memory that two streams use is not used again: a step would not fit"
        yield "parallel.overlap_shared_expert=true", reason, "set it to false"
    if parallel.overlap_param_gather:
        reason = "a replay cannot wait for a gather that began outside of it"
        yield "parallel.overlap_param_gather=true", reason, "set it to null"
    if parallel.cpu_offloading_num_layers:
        reason = "copies to the host would be ordered anew in each step"
        yield f"parallel.cpu_offloading_num_layers={parallel.cpu_offloading_num_layers}", reason, "set it to 0"
    if experiment.precision.fp8_parameters:
        reason = "an update may put the transposed weights into other memory"
        yield "precision.fp8_parameters=true", reason, "set it to false"
    if experiment.precision.dtype == "fp32":
        reason = "no attention kernel for fp32 reads the boundaries of documents from memory"
        yield "precision.dtype=fp32", reason, "set it to bf16"
    if runtime.attention_backend != "auto" and not BACKENDS[runtime.attention_backend].reads_memory:
        able = ", ".join(name for name, backend in BACKENDS.items() if backend.reads_memory)
        reason = "it does not read the boundaries of documents from memory"
        yield f"runtime.attention_backend={runtime.attention_backend}", reason, f"set it to auto or one of {able}"


RECORDING_RULES = (recorded_steps_repeat_themselves,)
