"""What is evaluated, opened: an exported folder, or a run's checkpoint on the ranks of a job."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.scoring import Scorer

LONGEST = 1 << 60
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Opened:
    """A model that answers."""

    lm: Any
    """An LM of lm-eval."""
    scorer: Scorer
    tokenizer: Any
    """Of transformers."""
    token_bytes: np.ndarray
    """Bytes of text behind each token id."""
    facts: dict[str, Any]
    """What it is, for the result."""


def is_export(path: Path) -> bool:
    """Whether a folder is a model in Hugging Face format; otherwise it is a run. Raises EvaluationError if it is
    neither."""
    if (path / "config.json").is_file():
        return True
    if (path / "resolved.yaml").is_file():
        return False
    raise EvaluationError(f"{path}: neither an exported model (no config.json) nor a run directory (no resolved.yaml)")


@contextmanager
def open_export(
    folder: Path, *, device: str | None, batch_size: int, dtype: str | None = None, trust_remote_code: bool = False
) -> Iterator[Opened]:
    """An exported model in transformers, with its cache. Raises EvaluationError, CheckpointError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            f"{folder}: an exported model is evaluated by one process; start it without a launcher, or give the run"
        )
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise EvaluationError(
            f"{folder}: no tokenizer ({', '.join(missing)} not there); export again, or copy it there"
        )
    import torch

    from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer
    from hunyuan_pretrain.data.hf_tokenizer import read_hf_tokenizer
    from hunyuan_pretrain.evaluation.harness_models import of_export
    from hunyuan_pretrain.evaluation.quiet import quiet_harness
    from hunyuan_pretrain.evaluation.transformers_scorer import TransformersScorer

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"--device {place}: this machine has no usable CUDA device; use cpu")
    formats = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    model = load_model(folder, dtype=formats[dtype], device=place, trust_remote_code=trust_remote_code)
    tokenizer = _long_texts(load_tokenizer(folder, trust_remote_code=trust_remote_code))
    with quiet_harness():
        lm = of_export(model, tokenizer, batch_size)
    facts = {"model": str(folder), "engine": "transformers", "dtype": str(model.dtype).removeprefix("torch.")}
    certificate = folder / "certificate.json"
    if certificate.is_file():
        facts["source"] = json.loads(certificate.read_text(encoding="utf-8")).get("source")
    yield Opened(lm, TransformersScorer(model), tokenizer, read_hf_tokenizer(folder).token_bytes, facts)


@contextmanager
def open_run(
    run_dir: Path,
    *,
    step: int | None,
    layout: str | None,
    batch_tokens: int,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Opened | None]:
    """A run's checkpoint, on the ranks that torchrun's environment defines. On rank 0 it is opened; the other ranks
    get None, after rank 0 has left the block.

    layout: such as tp=2,pp=2; None: that of the run if it fits the ranks, on one rank none. Raises ConfigError,
    CheckpointError.
    """
    from hunyuan_pretrain.checkpoint.export_run import system_prompt_of
    from hunyuan_pretrain.evaluation.layout_scorer import LayoutScorer, checkpoint_and_stage, load
    from hunyuan_pretrain.parallel.agreement import patience
    from hunyuan_pretrain.parallel.groups import destroy_groups

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint, experiment, stage = checkpoint_and_stage(run_dir, step)
    if device is not None:
        runtime = experiment.runtime.model_copy(update={"device": device.partition(":")[0]})
        experiment = experiment.model_copy(update={"runtime": runtime})
    chosen = layout if layout is not None else _own_layout(experiment, ranks)
    loaded = load(experiment, checkpoint, chosen, ranks)
    scorer = LayoutScorer(
        loaded, rope_alpha=stage.rope_alpha, max_length=stage.sequence_length, batch_tokens=batch_tokens, say=say
    )
    if int(os.environ.get("RANK", "0")) > 0:
        scorer.follow()
        yield None
    else:
        facts = {
            "model": str(run_dir),
            "engine": "run",
            "dtype": str(loaded.wrapped[0].config.params_dtype).removeprefix("torch."),
            "source": {
                "run": experiment.name,
                "step": int(checkpoint.name.rpartition("_")[2]),
                "weights": "trained",
            },
            "layout": chosen,
            "ranks": ranks,
        }
        with patience(), tempfile.TemporaryDirectory(prefix="hunyuan_evaluate_") as folder:
            prompt = system_prompt_of(checkpoint, say)
            yield of_run(scorer, run_dir / "tokenizer", Path(folder), facts, prompt)
            scorer.release()  # not after an error: other ranks may be in the middle of an answer
    destroy_groups()


def of_run(
    scorer: Any, tokenizer_folder: Path, scratch: Path, facts: dict[str, Any], system_prompt: str | None = None
) -> Opened:
    """A scorer with the tokenizer that an export of the run would have, whose files are written to `scratch`.
    system_prompt: as of `export_run.system_prompt_of`."""
    from hunyuan_pretrain.checkpoint.generate import load_tokenizer
    from hunyuan_pretrain.data.tokenizer import Tokenizer, write_hf_tokenizer
    from hunyuan_pretrain.evaluation.harness_models import ScorerLM

    own = Tokenizer.load(tokenizer_folder)
    write_hf_tokenizer(own, scratch, model_max_length=scorer.max_length, system_prompt=system_prompt)
    tokenizer = _long_texts(load_tokenizer(scratch))
    lm = ScorerLM(scorer, tokenizer, (own.end_id, own.eos_id))
    return Opened(lm, scorer, tokenizer, own.token_bytes, facts)


def _long_texts(tokenizer: Any) -> Any:
    """Without the warning that a text is longer than the model: here it is cut, or read in pieces."""
    tokenizer.model_max_length = LONGEST
    return tokenizer


def _own_layout(experiment: Any, ranks: int) -> str:
    """The run's sizes in one line. Raises ConfigError if they do not fit."""
    if ranks == 1:
        return ""
    from hunyuan_pretrain.config.layouts import SIZES

    sizes = {key: getattr(experiment.parallel, name) for key, name in SIZES.items()}
    text = ",".join(f"{key}={size}" for key, size in sizes.items() if size > 1)
    if ranks % (sizes["tp"] * sizes["pp"] * sizes["cp"]):
        rule = f"the run's own layout ({text}) does not fit {ranks} ranks"
        raise ConfigError("--layout", [Problem("--layout", Problem.NO_VALUE, rule, "give one, such as --layout tp=2")])
    return text
