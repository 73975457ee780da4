"""When the training loop saves, waits for a save, and what it logs of each."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import step_of
from hunyuan_pretrain.checkpoint.saving import Saved, Saver
from hunyuan_pretrain.train.optimizer import gather_parameters
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step_result import LaunchedStep


class Saves:
    """The checkpoints that the loop saves. All ranks call every method together."""

    def __init__(self, run: Run) -> None:
        self._run, self._saver = run, Saver(run.chunks, run.optimizer, run.lock)
        self._has_noted = False
        self.newest: int | None = None
        """Steps done of the newest checkpoint that this object has completed."""
        self._begun = 0
        settings = run.experiment.checkpoint
        if settings.async_save and settings.save_every_steps is not None:
            self._saver.prepare()

    @property
    def progress(self) -> int:
        """For the next step (checkpoint.saving.Saver)."""
        return self._saver.progress

    def after_step(self, step: LaunchedStep) -> None:
        """End a save that all ranks have written. `step`: one whose numbers all ranks have read."""
        if self._saver.after_step(step.step, step.save_progress()):
            self.finish()

    def save(self, done: int, must_succeed: bool, owes: Collection[str] = ()) -> None:
        """Save a checkpoint after `done` steps; with checkpoint.async_save, only copy the state and start to write it.

        With `must_succeed`, wait for it and raise CheckpointError if it fails. Without, a failure is only logged: the
        next save may work, and the run is worth more than one checkpoint. owes: what a stop has left undone, such as
        resume.OWES_VALIDATION.
        """
        self.finish()
        run, settings = self._run, self._run.experiment.checkpoint
        record = run.record(done) | dict.fromkeys(owes, True)
        gather_parameters(run.wrapped)
        self._begun = done
        try:
            self._saver.begin(run.run_dir, done, settings.keep_last, record, settings.keep_every_steps)
        except CheckpointError as error:
            self._report(error, must_succeed)
        if not self._has_noted and (note := self._saver.note()) is not None:
            self._has_noted = True
            run.log.line(f"warning: {note}")
        if must_succeed or not settings.async_save:
            self.finish(must_succeed)
        if not settings.async_save:
            self._saver.free_memory()

    def finish(self, must_succeed: bool = False) -> None:
        """Wait for the save in flight, if there is one, and log what became of it."""
        self._log(self._saver.finish, must_succeed)

    def rescue(self) -> None:
        """The run ends with an error: end the save in flight without communication, and log what became of it. When
        this returns, nothing writes to the run's checkpoints any more under the run's lock."""
        self._log(self._saver.rescue)

    def _log(self, end: Callable[[], Saved | None], must_succeed: bool = False) -> None:
        log = self._run.log
        try:
            saved = end()
        except CheckpointError as error:
            self._report(error, must_succeed)
            return
        if saved is not None:
            self.newest = self._begun
            log.line(
                f"saved {saved.folder}: copied in {saved.copy_seconds:.2f} s, complete after {saved.seconds:.2f} s"
            )
            for line in saved.notes:
                log.line(line)
            log.event("saved", f"complete after {saved.seconds:.2f} s", step_of(saved.folder))

    def make_room(self) -> None:
        """Wait for the save in flight, and free the host memory: a roll-back reads as much as a save copies."""
        self.finish()
        self._saver.free_memory()

    def _report(self, error: CheckpointError, must_succeed: bool) -> None:
        """What was written is removed, so lines of the log that met a full disk may find room; the process may end."""
        self._run.log.flush()
        self._run.log.event("save failed", str(error).partition("\n")[0])
        if must_succeed:
            raise error
        self._run.log.line(f"WARNING: {error}")
