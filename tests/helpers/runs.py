"""Runs started as a user starts them: a tiny corpus, an experiment file for it, and the command as a process."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.helpers.ranks import forking, of_torchrun, store

ROOT = Path(__file__).parents[2]
SEQUENCE_LENGTH = 64
VOCAB_SIZE = 512


def make_corpus(folder: Path) -> Path:
    """Make a tokenizer and packed training and held-out data from files of the standard library, with data_tools."""
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize
    from data_tools.tokenizer_training import train_tokenizer

    texts = folder / "texts"
    texts.mkdir(parents=True)
    for module in ("textwrap", "calendar", "string", "shlex", "heapq", "bisect", "queue", "sched"):
        source = Path(json.__file__).parents[1] / f"{module}.py"
        shutil.copy(source, texts / f"{module}.txt")
    extensions = [".txt"]
    train_tokenizer([str(texts)], VOCAB_SIZE, str(folder / "tokenizer"), text_field="text", extensions=extensions)
    tokenize(
        [str(texts)],
        str(folder / "tokenizer"),
        str(folder / "tokenized"),
        extensions=extensions,
        holdout_every=4,
        holdout_output=str(folder / "tokenized_heldout"),
    )
    pack([str(folder / "tokenized")], SEQUENCE_LENGTH, str(folder / "train"), seed=1)
    pack([str(folder / "tokenized_heldout")], SEQUENCE_LENGTH, str(folder / "heldout"), seed=1)
    return folder


def experiment_fields(corpus: Path, run_dir: Path, steps: int = 4, **changes: Any) -> dict[str, Any]:
    """The content of a small experiment file with every feature on. model__num_layers=2 changes model.num_layers;
    stages__x changes all stages."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "seed": 7,
        "tokenizer": str(corpus / "tokenizer"),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 48,
            "moe_ffn_hidden_size": 40,
            "num_moe_experts": 4,
            "padded_vocab_size": VOCAB_SIZE,
            "moe_routing_group_tokens": 32,
            "moe_aux_loss_coeff": 0.01,
            "init_method_std": 0.1,
        },
        "parallel": {},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "stages": [
            {
                "name": "warmup",
                "tokens": 8 * SEQUENCE_LENGTH,
                "sequence_length": SEQUENCE_LENGTH,
                "global_batch_sequences": 8,
                "micro_batch_sequences": 2,
                "lr_end": 1.0,
                "data": [{"path": str(corpus / "train")}],
            },
            {
                "name": "decay",
                "tokens": (steps - 1) * 8 * SEQUENCE_LENGTH,
                "sequence_length": SEQUENCE_LENGTH,
                "global_batch_sequences": 8,
                "micro_batch_sequences": 2,
                "rope_alpha": 10.0,
                "lr_end": 0.1,
                "data": [{"path": str(corpus / "train")}],
            },
        ],
        "evaluation": {},
        "checkpoint": {},
        "logging": {"wandb": "disabled", "tensorboard": False},
        "runtime": {"device": "cpu", "cpu_threads_per_rank": 1, "distributed_timeout_s": 120},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        targets = fields["stages"] if section == "stages" else [fields[section]] if key else [fields]
        for target in targets:
            target[key or section] = value
    return fields


def write_experiment(path: Path, fields: dict[str, Any]) -> Path:
    """Write the experiment as a YAML file."""
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def start(*arguments: str, ranks: int | None = None) -> subprocess.Popen[str]:
    """Start `python -m hunyuan_pretrain ...`; with `ranks`, under torchrun."""
    command = [sys.executable, "-m"]
    if ranks is not None:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # where test_versions.py has packages
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.Popen(
        [*command, "hunyuan_pretrain", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def run(*arguments: str, ranks: int | None = None, timeout_s: float = 180) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `start`."""
    process = start(*arguments, ranks=ranks)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        kill_all(process)
    return process.returncode, out, err


def run_forked(*arguments: object, ranks: int | None = None, timeout_s: float = 180) -> tuple[int, str, str]:
    """`run` in forks of a process that has imported what training imports; for tests of what happens after the imports.
    With `ranks`, the forks find each other as under torchrun, but nothing ends the others when one fails; the status is
    that of the first rank that failed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        meeting = store() if ranks else None
        places = [of_torchrun(rank, ranks, meeting.port) for rank in range(ranks)] if ranks and meeting else [{}]
        words = [*map(str, arguments)]
        processes = [forking().Process(target=_command, args=(words, place, *outputs)) for place in places]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        is_done = all(process.exitcode is not None for process in processes)
        for process in processes:
            process.kill()
            process.join()
        out, err = (path.read_text(encoding="utf-8") for path in outputs)
        assert is_done, f"not done after {timeout_s} s:\n{out}{err}"
        return next((process.exitcode for process in processes if process.exitcode), 0), out, err


def _command(arguments: list[str], place: dict[str, str], *outputs: Path) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= place
    os.chdir(ROOT)
    sys.argv = ["hunyuan_pretrain", *arguments]
    runpy.run_module("hunyuan_pretrain", run_name="__main__", alter_sys=True)


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 the process and everything that it started; torchrun gives each rank its own process group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool], timeout_s: float = 180) -> None:
    """`kill_all` as soon as `condition` holds; fails if the process ends before that."""
    deadline = time.monotonic() + timeout_s
    try:
        while not condition():
            assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()}"
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.002)
    finally:
        kill_all(process)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; [] before there are any."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
