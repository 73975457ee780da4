"""evaluation.tasks: benchmarks on a run while it trains. Rank 0 asks, all ranks compute."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hunyuan_pretrain.checkpoint.export_run import system_prompt_in
from hunyuan_pretrain.config.derived import TASKS_BATCH_TOKENS
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.evaluation import EvaluationError, ScoringStoppedError
from hunyuan_pretrain.evaluation.catalogue import GROUPS
from hunyuan_pretrain.evaluation.layout_scorer import LayoutScorer
from hunyuan_pretrain.evaluation.opened import of_run
from hunyuan_pretrain.evaluation.quiet import quiet_bars, stay_offline
from hunyuan_pretrain.evaluation.requests import Request
from hunyuan_pretrain.train.benchmarks import Measured
from hunyuan_pretrain.train.run import Run

if TYPE_CHECKING:
    from hunyuan_pretrain.evaluation.harness import Chosen


class TasksOfRun:
    """The tasks of one run; `train.benchmarks.Benchmarks`. lm-eval and the files are needed where rank 0 is."""

    def __init__(self) -> None:
        self._chosen: Chosen | None = None
        self._kept = ExitStack()
        """The folder of the tables that are made of the files: tasks read them as long as the run lasts."""

    def obstacle(self, experiment: Experiment) -> str | None:
        """As in `Benchmarks`."""
        settings = experiment.evaluation
        data = None if settings.tasks_data is None else Path(settings.tasks_data)
        request = Request([*settings.tasks], data)
        if data is not None and not data.is_dir():
            return f"evaluation.tasks_data={data} is not a folder"
        # a group is run without the rows that another model judges
        if judged := Request([name for name in settings.tasks if name not in GROUPS]).judged:
            names = ", ".join(row.name for row in judged)
            return f"{names}: judged by another model; `evaluate --answers` writes the answers of a checkpoint"
        if find_spec("lm_eval") is None:
            return 'lm-eval is not installed where rank 0 is: pip install "hunyuan-pretrain[eval]"'
        stay_offline()
        try:
            self._chosen = self._load(request)
            self._harness().refuse_long_answers(self._chosen, max(stage.sequence_length for stage in experiment.stages))
        except EvaluationError as error:
            return str(error)
        return None

    @staticmethod
    def _harness() -> Any:
        """Imported late: it needs lm-eval, which takes seconds."""
        from hunyuan_pretrain.evaluation import harness

        return harness

    def _load(self, request: Request) -> Chosen:
        from hunyuan_pretrain.evaluation.benchmarks import refuse_code_without_sandbox

        refuse_code_without_sandbox(request)
        scratch = self._kept.enter_context(self._harness().scratch_folder())
        with quiet_bars():
            chosen: Chosen = self._harness().choose(request.scored, request.data, scratch, may_run_code=False)
        return chosen

    def measure(self, run: Run, stage: StageConfig, is_stop_asked: Callable[[], bool]) -> Measured:
        """As in `Benchmarks`."""
        scorer = LayoutScorer(
            run,
            rope_alpha=stage.rope_alpha,
            max_length=stage.sequence_length,
            batch_tokens=TASKS_BATCH_TOKENS,
            is_stop_asked=is_stop_asked,
        )
        if dist.get_rank() == 0:
            told: list[Any] = [self._lead(run, stage, scorer)]
        else:
            told = [None]
            with suppress(EvaluationError, ScoringStoppedError):  # rank 0 has met the same, and says so
                scorer.follow()
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(told, src=0)
        found: Measured = told[0]
        return found

    def _lead(self, run: Run, stage: StageConfig, scorer: LayoutScorer) -> Measured:
        """On rank 0. Raises what it met in the middle of an answer, where other ranks may wait for each other."""
        assert self._chosen is not None
        settings, harness = run.experiment.evaluation, self._harness()
        try:
            with quiet_bars(), tempfile.TemporaryDirectory(prefix="hunyuan_evaluate_") as folder:
                prompt = system_prompt_in(stage, run.loader.order.facts)
                lm = of_run(scorer, run.run_dir / "tokenizer", Path(folder), {}, prompt).lm
                is_chat = Request([*settings.tasks]).is_chat
                results = harness.run(lm, self._chosen, limit=settings.tasks_limit, chat=is_chat)
            records = harness.table(self._chosen, results)
            found = Measured({f"{one['task']}/{metric_name(one['metric'])}": float(one["value"]) for one in records})
        except ScoringStoppedError:
            return Measured(is_stopped=True)
        except Exception as error:
            if not scorer.is_followed and not isinstance(error, EvaluationError):
                raise
            found = Measured(failure=f"{type(error).__name__}: {error}")
        if scorer.is_followed:
            scorer.release()
        return found


def metric_name(metric: str) -> str:
    """lm-eval's "acc,none" as acc, "exact_match,strict-match" as exact_match.strict-match."""
    return metric.removesuffix(",none").replace(",", ".")
