"""Export a run to Hugging Face's format from Python, and let the exported model continue a text.

python examples/export.py demo_out/run demo_out/model "def main("
"""

from __future__ import annotations

import sys
from pathlib import Path

from hunyuan_pretrain.runtime.environment import prepare


def main(run: str, output: str, prompt: str) -> None:
    """Write the newest checkpoint of `run` to the new folder `output`."""
    prepare(None)  # before torch is imported: an export runs on the CPU

    from hunyuan_pretrain.checkpoint.export_run import export_run
    from hunyuan_pretrain.checkpoint.generate import generate

    # Reads the folder back and compares it with the training model; a difference raises CheckpointError.
    certificate = export_run(Path(run), Path(output), dtype="bf16")
    print(f"step {certificate['source']['step']}, largest difference {certificate['max_abs_difference']:.3g}")
    generate(Path(output), prompt, max_new_tokens=16, temperature=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
