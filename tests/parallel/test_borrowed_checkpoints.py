"""A comparison starts from a run's checkpoints, in a separate folder on each rank, and leaves the run unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.ranks import fork_ranks


def tried(folder: Path) -> list[str]:
    """What `load_newest` tries if each rank has its own run directory."""
    import torch.distributed as dist

    from hunyuan_pretrain.checkpoint import CheckpointError, save_load
    from hunyuan_pretrain.parallel.groups import initialize_distributed

    initialize_distributed("gloo", 60)
    seen: list[str] = []

    def look(found: Path) -> Any:
        seen.append(str(found))
        raise save_load.DamagedCheckpointError(f"{found}: looked at")

    save_load._whole_marker = look
    run_dir = folder / str(dist.get_rank())
    try:
        save_load.load_newest(run_dir, [], None)  # type: ignore[arg-type]
    except CheckpointError:
        return seen
    return []


def test_rank_0_chooses_the_checkpoint_and_each_rank_reads_it_from_its_own_run_directory(tmp_path: Path) -> None:
    for rank, steps in ((0, [3]), (1, [3, 4])):
        for step in steps:
            (tmp_path / str(rank) / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
    assert fork_ranks(2, tried, tmp_path) == [[str(tmp_path / rank / "checkpoints/step_0000003")] for rank in "01"]


def test_a_shadow_run_leaves_a_training_run_unchanged(tmp_path: Path) -> None:
    from hunyuan_pretrain.checkpoint import folders
    from hunyuan_pretrain.config.decisions import Decision, append_decision, read_decisions
    from hunyuan_pretrain.diagnostics.shadow import borrow_checkpoints

    run, shadow = tmp_path / "run", tmp_path / "shadow"
    shadow.mkdir()
    for name in ("step_0000001", "step_0000002.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "file").touch()
    append_decision(run, Decision(time="t", kind="rollback", cause="spike", step=4, to_step=1, number=1))
    before = sorted(run.rglob("*"))
    borrow_checkpoints(run, shadow)
    assert read_decisions(shadow) == read_decisions(run), "what the run left out, the shadow leaves out too"
    append_decision(shadow, Decision(time="t", kind="skip", cause="spike", step=5))
    assert len(read_decisions(run)) == 1
    assert [folder.name for folder in folders.named_checkpoints(shadow)] == ["step_0000001"]
    assert (shadow / "checkpoints/step_0000001/file").exists()
    folders.remove_partials(shadow)
    folders.set_aside(shadow / "checkpoints/step_0000001")
    assert sorted(run.rglob("*")) == before
