"""256K tokens in one packed sequence of real text: the step is finite, equal under context parallelism, and linear in
memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.diagnostics.parity import TOLERANCE
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import VOCAB_SIZE, experiment_fields

pytestmark = pytest.mark.slow
LENGTHS = (32_768, 65_536, 131_072, 262_144)
CONTEXT_PARALLEL = {"context_parallel_size": 2, "recompute": "cla_group"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules of the standard library, tokenized once and packed to each length. Documents have several thousand
    tokens, because the time of attention, though not its memory, grows with the square of a document's length."""
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize
    from data_tools.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("long")
    (folder / "texts").mkdir()
    library = Path(json.__file__).parents[1]
    files = [
        path for pattern in ("*.py", "[a-z]*/*.py", "[a-z]*/[a-z]*/[a-z]*.py") for path in sorted(library.glob(pattern))
    ]
    for number, source in enumerate(
        path for path in files if 3_000 < path.stat().st_size < 10_000 and "site-packages" not in path.parts
    ):
        shutil.copy(source, folder / "texts" / f"{number}.txt")
    train_tokenizer(
        [str(folder / "texts")], VOCAB_SIZE, str(folder / "tokenizer"), text_field="text", extensions=[".txt"]
    )
    tokenize([str(folder / "texts")], str(folder / "tokenizer"), str(folder / "tokenized"))
    for length in LENGTHS:
        pack([str(folder / "tokenized")], length, str(folder / f"packed_{length}"), seed=1)
    return folder


def one_step(fields: dict[str, Any]) -> tuple[float, float, int, float, float]:
    """(loss, gradient norm, documents in the pack, resident MiB of this rank before one training step, peak MiB during
    it)."""
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import train_step

    run = setup.prepare(Experiment.model_validate(fields))
    (batch,) = run.loader.micro_batches(0)
    # not ru_maxrss, which begins with the size of the process that started this one
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_mib("VmRSS")
    result = train_step(run, run.experiment.stages[0], 0)
    peak = status_mib("VmHWM")
    run.loader.close()
    return result.loss, result.grad_norm, len(batch.cu_seqlens) - 1, before, peak


def status_mib(name: str) -> float:
    """A size in this process's status, such as VmRSS or its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def step_of(
    text: Path, run_dir: Path, length: int, ranks: int, parallel: dict[str, Any]
) -> list[tuple[float, float, int, float, float]]:
    changes: dict[str, Any] = {"model__num_layers": 2, "model__num_attention_heads": 2, "model__num_query_groups": 1}
    fields = experiment_fields(text, run_dir, 1, parallel=parallel, model__moe_routing_group_tokens=512, **changes)
    stage = {
        "name": "long",
        "sequence_length": length,
        "global_batch_sequences": 1,
        "micro_batch_sequences": 1,
        "tokens": length,
    }
    fields["stages"] = [stage | {"rope_alpha": 1e5, "lr_end": 1.0, "data": [{"path": str(text / f"packed_{length}")}]}]
    return fork_ranks(ranks, one_step, fields, timeout_s=900)


def test_a_step_of_256k_tokens_is_the_same_on_two_ranks_and_memory_is_linear(text, tmp_path, capsys):
    """Memory is a rank's peak above its size before the step; printed with the exponent of its growth over the
    lengths."""
    measured = {length: step_of(text, tmp_path / f"cp2_{length}", length, 2, CONTEXT_PARALLEL) for length in LENGTHS}
    alone = step_of(text, tmp_path / "cp1", LENGTHS[-1], 1, {"recompute": "cla_group"})[0]
    loss, grad_norm, documents, *_ = measured[LENGTHS[-1]][0]
    assert math.isfinite(loss)
    assert documents > 5, "packed: several documents"
    assert loss == pytest.approx(alone[0], rel=TOLERANCE)
    assert grad_norm == pytest.approx(alone[1], rel=TOLERANCE)

    peaks = {length: max(peak - before for *_, before, peak in ranks) for length, ranks in measured.items()}
    exponent = float(np.polyfit(np.log(list(peaks)), np.log(list(peaks.values())), 1)[0])
    with capsys.disabled():
        print(
            f"\none step of a packed sequence, {documents} documents in {LENGTHS[-1]:,} tokens, loss {loss:.6f} "
            f"(CP 1: {alone[0]:.6f})"
        )
        print("peak MiB of a rank, CP 2:", {length: round(peak) for length, peak in peaks.items()}, end="")
        print(f", exponent {exponent:.2f}; CP 1 at {LENGTHS[-1]:,}: {alone[4] - alone[3]:.0f}")
    assert 0.8 < exponent < 1.1, f"memory is not linear in the sequence: {peaks}"
