"""Every node has its own copy of the configuration, the data, the tokenizer and the code, its own packages and its own
clock; ranks that would train something different do not start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

DRIVER = "H100; driver 570; SM clock at most 1980 MHz"


def starts(fields: dict[str, Any]) -> list[str]:
    """Refusals of starts in which rank 2 differs in one thing."""
    from hunyuan_pretrain.config.errors import ConfigError
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.parallel.groups import initialize_distributed
    from hunyuan_pretrain.train import same_start

    initialize_distributed("gloo", 60)
    is_other = os.environ["RANK"] == "2"
    at_fault = lambda change: change if is_other else {}  # noqa: E731

    def refusal(change: dict[str, Any], data: str = "a", tokenizer: str = "t") -> str:
        experiment = Experiment.model_validate(fields | at_fault(change))
        try:
            same_start.refuse_other_starts(experiment, data if is_other else "a", tokenizer if is_other else "t", "v")
        except ConfigError as error:
            return str(error)
        return ""

    def patched(name: str, value: Callable[..., Any]) -> str:
        with patch.object(same_start, name, value if is_other else getattr(same_start, name)):
            return refusal({})

    found = [
        refusal({}),
        refusal({"tokenizer": "/elsewhere", "run_dir": "/elsewhere"}),
        refusal({"optimizer": {"lr": 0.5}}),
        refusal({}, data="b"),
        refusal({}, tokenizer="u"),
        patched("versions", lambda: {"torch": "2.0", "numpy": "1.0"}),
        patched("compared", lambda: {"NCCL_ALGO": "Ring"}),
        patched("code_digest", lambda: "SHA-256 0123456789abcdef of hunyuan_pretrain"),
    ]
    with patch.object(same_start, "gpu_state", lambda index: DRIVER.replace("1980", "1200") if is_other else DRIVER):
        found.append(refusal({}))
    with patch.dict(os.environ, {"LOCAL_RANK": "1"} if is_other else {}):
        found.append(patched("code_digest", lambda: "of a rank that is not the first of its node"))
    ahead = time.time

    def behind() -> float:
        return ahead() - 3600.0

    with patch.object(time, "time", behind if is_other else ahead):
        found.append(refusal({}))
        fields["runtime"] = {**fields.get("runtime", {}), "ranks_may_differ_in": ["clock"]}
        found.append(refusal({}))
    return found


def test_ranks_that_differ_are_named_and_do_not_start(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"}
    ranks = fork_ranks(3, as_first_ranks, experiment_fields(tmp_path, tmp_path / "run"), environment)
    assert ranks[0] == ranks[1] == ranks[2]
    same, moved, *differing, not_first, clock, accepted = ranks[0]
    assert (same, moved, not_first, accepted) == ("", "", "", "")
    names = ("settings", "data", "tokenizer", "packages", "environment", "code", "gpu")
    for text, name in zip(differing, names, strict=True):
        assert text.startswith("ranks of this job: 1 problem\n")
        assert f"  {name}: not the same on all ranks: differs from rank 0 on 2 (" in text
    assert "give every node the same files and the same command" in differing[0]
    assert "(rank 0: a; rank 2: b)" in differing[1]
    assert "; rank 2: torch 2.0; numpy 1.0)" in differing[3]
    assert "megatron-core" in differing[3]
    assert "rank 2: NCCL_ALGO=Ring" in differing[4]
    assert "(rank 0: SM clock at most 1980 MHz; rank 2: SM clock at most 1200 MHz)" in differing[6]
    assert "  clock: not the same on all ranks: differs from rank 0 on 2, by 3600 s at least" in clock


def meetings(fields: dict[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    """What two ranks say to the same start and to starts that rank 1 reads from other folders."""
    from hunyuan_pretrain.config.errors import ConfigError
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.data.errors import DataFormatError
    from hunyuan_pretrain.parallel.groups import initialize_distributed
    from hunyuan_pretrain.train import same_start

    initialize_distributed("gloo", 60)
    found = []
    for number, change in enumerate([{}, *changes]):
        is_changed = os.environ["RANK"] == "1" or number == len(changes)  # the last one on both
        try:
            same_start.meet(Experiment.model_validate(fields | change if is_changed else fields))
        except (ConfigError, DataFormatError) as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_a_folder_that_one_rank_lacks_or_has_otherwise_is_named(tmp_path: Path, corpus: Path) -> None:
    fields = experiment_fields(corpus, tmp_path, evaluation={"data": str(corpus / "heldout")})
    none, other = str(tmp_path / "none"), {"evaluation": {"data": str(corpus / "train")}}
    one, two = fork_ranks(2, meetings, fields, [{"tokenizer": none}, other, {"tokenizer": none}])
    same, missing, validation, on_both = one
    assert one[:3] == two[:3]
    assert same == ""
    assert "  tokenizer: not the same on all ranks: differs from rank 0 on 1 (rank 0: " in missing
    assert f"; rank 1: {none}: " in missing
    assert "  validation: not the same on all ranks: differs from rank 0 on 1 (rank 0: " in validation
    assert on_both == two[3]
    assert on_both.startswith(f"{none}: ")


def as_first_ranks(fields: dict[str, Any], environment: dict[str, str]) -> list[str]:
    """`starts`, each rank as the first one of a node."""
    with patch.dict(os.environ, environment):
        return starts(fields)


def late() -> list[Any]:
    """What is measured of equal clocks if ranks come late to every barrier, and of one that is half a second off."""
    from torch import distributed as dist

    from hunyuan_pretrain.parallel.comparison import clocks_off

    dist.init_process_group("gloo")
    rank, real = dist.get_rank(), time.time

    def slow() -> float:
        time.sleep(0.2 * rank)
        return real()

    with patch.object(time, "time", slow):
        found = [clocks_off(0.01)]
    with patch.object(time, "time", lambda: real() + 0.5 * rank):
        found.append(clocks_off(0.3))
    return found


def test_a_late_rank_is_not_a_wrong_clock() -> None:
    for on_time, off in fork_ranks(2, late):
        assert on_time == []
        ((rank, seconds),) = off
        assert rank == 1
        assert 0.3 < seconds <= 0.5


def said() -> list[Any]:
    """What few of four ranks have to say, and the worst of their values."""
    from torch import distributed as dist

    from hunyuan_pretrain.parallel.comparison import differences, sums_of_ranks, texts_of_ranks, worst_of_ranks

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    return [
        texts_of_ranks(None),
        texts_of_ranks(f"of {rank}" if rank % 2 else None),
        texts_of_ranks(f"of {rank}", most=3),
        worst_of_ranks([rank, -rank, float("nan") if rank == 2 else 0.0]),
        sums_of_ranks(rank, 1),
        [(found.name, found.ranks, found.texts) for found in differences({"x": "1", "y": f"{rank // 2}", "z": None})],
    ]


def test_all_ranks_learn_what_some_have_to_say() -> None:
    ranks = fork_ranks(4, said)
    assert all(found == ranks[0] for found in ranks)
    silent, odd, first, worst, sums, different = ranks[0]
    assert silent == []
    assert odd == [(1, "of 1"), (3, "of 3")]
    assert first == [(0, "of 0"), (1, "of 1"), (2, "of 2")]
    assert worst == [(3.0, 3), (0.0, 0), (float("inf"), 2)]
    assert sums == [6, 4]
    assert different == [("y", [2, 3], ("0", "1"))]
