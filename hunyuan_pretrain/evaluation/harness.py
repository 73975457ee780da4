"""Runs benchmarks of lm-eval on a model, from local files, without a network."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import set_torch_seed

from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.benchmark_files import MissingDataError, load_local
from hunyuan_pretrain.evaluation.catalogue import GROUPS, Row, known_rows, rows_of
from hunyuan_pretrain.evaluation.harness_models import MAX_GEN_TOKS
from hunyuan_pretrain.evaluation.quiet import quiet_datasets, quiet_harness

OURS = Path(__file__).parent / "tasks"
ORIGINALS = Path(lm_eval.__file__).parent / "tasks"
SEED = 1234
"""Of few-shot examples that are drawn; lm-eval's own."""
EVALUATES_ANSWERS = re.compile("(prompt|non_greedy)_robustness_math")
"""Tasks that give answers to sympy's parser, which evaluates them as Python; lm-eval does not mark these as unsafe."""


@dataclass
class Chosen:
    """Tasks that are loaded, with the row of the published table that each belongs to."""

    rows: list[Row]
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


def choose(names: Sequence[str], data: Path | None, scratch: Path, *, may_run_code: bool) -> Chosen:
    """Load tasks by name: rows of the published tables, their groups, and any other task of lm-eval.

    scratch: a folder for tables made of the files, which must exist as long as the tasks are used. Raises
    EvaluationError with every unknown name, or everything that is missing; and if code of the model would run and may
    not.
    """
    rows = list(dict.fromkeys(row for name in names for row in rows_of(name)))
    rows += [Row(name) for name in names if not rows_of(name) and name not in {row.task for row in rows}]
    chosen, missing = Chosen(rows), list[str]()
    with _offline(data, scratch), quiet_datasets(), quiet_harness():
        manager = _manager([row.task for row in rows])
        _refuse_unknown(manager, [row.task for row in rows])
        for row in rows:
            try:
                loaded: Any = manager.load([row.task])
            except (MissingDataError, ImportError, AssertionError, LookupError, OSError) as error:
                missing.append(f"{row.name}: {_reason(error)}")
                continue
            for task in loaded["tasks"].values():
                _settle(task, row)
            chosen.tasks |= loaded["tasks"]
            chosen.groups |= loaded.get("groups", {})
    if missing:
        raise EvaluationError("what these benchmarks need is missing:\n" + "\n".join(f"  {line}" for line in missing))
    if not may_run_code and (
        unsafe := [
            name
            for name, task in chosen.tasks.items()
            if getattr(task, "UNSAFE_CODE", False) or EVALUATES_ANSWERS.search(name)
        ]
    ):
        raise EvaluationError(
            f"{', '.join(unsafe)}: runs programs that the model writes, and not in this project's sandbox; "
            "`evaluate --unsafe-code` runs them with your rights"
        )
    return chosen


def run(lm: Any, chosen: Chosen, *, limit: int | None = None, chat: bool = False, samples: bool = False) -> Any:
    """lm-eval's results (a dictionary) of a model (an LM of lm-eval). limit: items of each task. chat: texts are turns
    of the chat template. samples: with every item and answer. Raises EvaluationError if a task's answers are longer
    than the model's texts."""
    refuse_long_answers(chosen, lm.max_length)
    for task in chosen.tasks.values():
        task.set_fewshot_seed(seed=SEED)  # a second run draws the examples of the first
    set_torch_seed(SEED)
    with quiet_harness():
        return lm_eval_evaluate(
            lm=lm,
            task_dict={
                "tasks": chosen.tasks,
                "groups": chosen.groups,
                "group_map": {name: group.child_names for name, group in chosen.groups.items()},
            },
            limit=limit,
            bootstrap_iters=0,
            log_samples=samples,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=True,  # `choose` has asked
        )


def refuse_long_answers(chosen: Chosen, max_length: int) -> None:
    """Raise EvaluationError if a task generates more tokens than a model of `max_length` positions has."""
    too_long = []
    for name, task in chosen.tasks.items():
        if task.get_config("output_type") == "generate_until":
            new = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, MAX_GEN_TOKS)["max_gen_toks"]
            too_long += [f"{name} ({new})"] if new >= max_length else []
    if too_long:
        raise EvaluationError(
            f"these tasks generate more tokens than the {max_length} positions of the model: {', '.join(too_long)}"
        )


def table(chosen: Chosen, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record for each row, or for each metric of a task that is in no table: `row`, `task`, `shots`, `metric`,
    `value`, `items`, and `published` where the release gives a number."""
    records: list[dict[str, Any]] = []
    found = {**results["results"], **results.get("groups", {})}
    for row in chosen.rows:
        for metric, value in _metrics(row, found[row.task]).items():
            records.append(
                {
                    "row": row.name,
                    "task": row.task,
                    "shots": _shots(chosen, row, results),
                    "metric": metric,
                    "value": value,
                    "items": _items(chosen, row, results),
                    "published": {name: number for name, number in row.published.items() if row.metric},
                }
            )
    return records


def _metrics(row: Row, found: Mapping[str, Any]) -> dict[str, float]:
    numbers = {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and "," in name and not name.partition(",")[0].endswith("_stderr")
    }
    if row.metric is None:
        return numbers
    chosen = {name: value for name, value in numbers.items() if name in (row.metric, f"{row.metric},none")}
    assert chosen, f"{row.task} has no {row.metric}, only {', '.join(numbers)}"
    return chosen


def _leaves(chosen: Chosen, row: Row) -> list[str]:
    if row.task not in chosen.groups:
        return [row.task]
    return [task.task_name for task in chosen.groups[row.task].get_all_tasks()]


def _shots(chosen: Chosen, row: Row, results: Mapping[str, Any]) -> int:
    return int(results["n-shot"][_leaves(chosen, row)[0]])


def _items(chosen: Chosen, row: Row, results: Mapping[str, Any]) -> int:
    return sum(int(results["n-samples"][name]["effective"]) for name in _leaves(chosen, row))


def _settle(task: Any, row: Row) -> None:
    if row.shots is not None:
        task.set_config(key="num_fewshot", value=row.shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _manager(names: Sequence[str]) -> TaskManager:
    """Over the folders that the rows of the tables need; reading all of lm-eval's takes ten times as long."""
    needed = [ORIGINALS / folder for row in known_rows() for folder in row.folders]
    manager = TaskManager(include_path=[OURS, *dict.fromkeys(needed)], include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=OURS)


def _refuse_unknown(manager: TaskManager, names: Sequence[str]) -> None:
    known = [*GROUPS, *manager.all_tasks]
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        lines.append(f"{name}: no such task{'; nearest: ' + ', '.join(near) if near else ''}")
    raise EvaluationError("\n".join([*lines, f"groups of this project: {', '.join(GROUPS)}"]))


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = {"antlr4": "math", "sympy": "math", "math_verify": "math"}
        extra |= {"langdetect": "ifeval", "immutabledict": "ifeval", "nltk": "ifeval"}
        name = error.name or ("math_verify" if "math_verify" in str(error) else "")
        hint = f"; pip install 'lm-eval[{extra[name]}]'" if name in extra else ""
        return f"needs a package that is not installed: {str(error).splitlines()[0]}{hint}"
    if isinstance(error, LookupError) and "nltk" in str(error).lower():
        return (
            "needs punkt_tab of NLTK: put it in DIR/nltk_data/tokenizers/punkt_tab; elsewhere: "
            "python -m nltk.downloader -d DIR/nltk_data punkt_tab"
        )
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


@contextmanager
def _offline(data: Path | None, scratch: Path) -> Iterator[None]:
    """Within it, the tasks of lm-eval read local files. It loads every data set through datasets.load_dataset, with a
    name of the hub; some tasks load more on import, which is refused by the packages' own offline settings."""
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if "data_files" in options:  # a task of the user's own with files of its own
            return original(path, name, cache_dir=str(scratch), **options)
        return load_local(data, scratch, path, name)

    with _punkt(data):
        lm_eval.api.task.datasets.load_dataset = load
        try:
            yield
        finally:
            lm_eval.api.task.datasets.load_dataset = original


@contextmanager
def _punkt(data: Path | None) -> Iterator[None]:
    """Within it, NLTK looks under the data folder, and downloads nothing: IFEval's task would, when it is imported."""
    try:
        import nltk
    except ModuleNotFoundError:
        yield
        return
    if data is not None:
        nltk.data.path.insert(0, str(data / "nltk_data"))
    original = nltk.download
    nltk.download = partial(_refuse_download, original)
    try:
        yield
    finally:
        nltk.download = original


def _refuse_download(_original: Any, resource: str = "", *_: Any, **__: Any) -> bool:
    raise LookupError(f"nltk: {resource} is not there")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for tables, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="hunyuan_evaluate_") as folder:
        yield Path(folder)


__all__ = ["Chosen", "choose", "refuse_long_answers", "run", "scratch_folder", "table"]
