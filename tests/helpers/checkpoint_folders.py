"""Checkpoint folders with a real complete.json over any files, for what does not look into them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint import folders


def write_checkpoint(run_dir: Path, step: int, files: int = 2, **record: Any) -> Path:
    """A complete checkpoint of `files` small files, of which nothing can be loaded."""
    folder = folders.checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"__{number}_0.distcp").write_bytes(f"{step} {number}".encode() * 10)
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    content = {"step": step, "world_size": files, "model": {}, "layout": f"dp={files}", "dtype": "torch.bfloat16"}
    folders.write_marker(folder, {**content, **record, "files": described})
    return folder
