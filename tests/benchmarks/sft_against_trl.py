"""Tokens/s of fine-tuning on conversations: this trainer, and TRL's SFTTrainer on an export of the same weights.

    python -m tests.benchmarks.sft_against_trl [--rounds 5] [--steps 2] [--conversations 600] [--json FILE]

This trainer packs conversations; TRL pads those of a batch to the longest, by default in random order. It can also
group them by length, or pack. All train on the answers of the same conversations, whose lengths are log-normal, in
steps of about as many tokens and micro-batches of about as many tokens without padding. Each runs in its own process
with two threads, fp32, without recomputation, and AdamW, 15 million parameters (the widths of train_step.py, 4 layers).
They take turns; a step is timed whole, with reading its batch. The median over the rounds counts, and the median of the
ratios within a round, by the clock and by CPU time. Tokens are those of conversations; padding is not counted. Needs
TRL (`make` installs it beside the environment).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.train_step import EXPERTS, FFN, GROUPS, HEADS, HIDDEN

NUM_LAYERS, VOCAB = 4, 2048
LENGTH, SEQUENCES = 1024, 2
CONVERSATIONS = 14
"""Of a step of TRL, in two micro-batches: about as many tokens as SEQUENCES full sequences."""
MEDIAN, SIGMA = 100, 0.9
"""Of the log-normal lengths in tokens, most of which are single bytes here; cut at LENGTH."""
THREADS, RATE = 2, 1e-5
ROOT = Path(__file__).parents[2]
OURS = "hunyuan-pretrain"
TRL: dict[str, dict[str, Any]] = {
    "TRL": {"per_device_train_batch_size": CONVERSATIONS // 2},
    "TRL, by length": {
        "per_device_train_batch_size": CONVERSATIONS // 2,
        "train_sampling_strategy": "group_by_length",
    },
    "TRL, packing": {"per_device_train_batch_size": SEQUENCES // 2, "packing": True, "max_length": LENGTH},
}


class Step(NamedTuple):
    """What one optimizer step did."""

    seconds: float
    cpu_seconds: float
    """Of all threads: on a busy machine they say more."""
    tokens: int
    """Without padding."""
    targets: int
    positions: int
    """With padding."""


Done = Callable[[Step], bool]
"""Called after each step; waits for the next turn and returns whether there is one."""


# --- the data and the weights -----------------------------------------------------------------------------------------


def prepare(folder: Path, count: int) -> None:
    """export, start (the same weights as a checkpoint), chats.jsonl, packed and experiment.yaml in `folder`."""
    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()

    from data_tools.chat import ChatForm
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize
    from hunyuan_pretrain.checkpoint.hf_import import import_model
    from hunyuan_pretrain.config.schema import ModelConfig
    from tests.helpers.runs import experiment_fields, write_experiment
    from tests.helpers.tiny_export import ALPHA, export_tiny, write_tiny_tokenizer

    model = ModelConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        padded_vocab_size=VOCAB,
    )
    export_tiny(model, write_tiny_tokenizer(folder), folder / "export", system_prompt="")
    import_model(folder / "export", folder / "start")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in conversations(count))
    form = ChatForm(system_prompt="")
    tokenize([str(folder / "chats.jsonl")], str(folder), str(folder / "tokens"), form=form)
    pack([str(folder / "tokens")], LENGTH, str(folder / "packed"), seed=1)
    fields = experiment_fields(folder, folder / "run", model=model.model_dump(mode="json"), tokenizer=str(folder))
    stage = {
        "name": "sft",
        "task": "sft",
        "tokens": 10_000 * SEQUENCES * LENGTH,
        "sequence_length": LENGTH,
        "global_batch_sequences": SEQUENCES,
        "rope_alpha": ALPHA,
        "lr_end": 1.0,
        "data": [{"path": str(folder / "packed")}],
    }
    fields |= {"stages": [stage], "checkpoint": {"init_from": str(folder / "start")}}
    fields["optimizer"] = {"lr": RATE, "expert_lr_ratio": 1.0}
    fields["parallel"] = {"use_distributed_optimizer": False}
    fields["runtime"]["cpu_threads_per_rank"] = THREADS
    write_experiment(folder / "experiment.yaml", fields)


def conversations(count: int) -> Iterator[list[dict[str, str]]]:
    """One to four turns; two thirds of the text are answers."""
    draw = np.random.default_rng(0)
    for size in draw.lognormal(np.log(MEDIAN), SIGMA, count).clip(16, 0.97 * LENGTH):
        turns = int(draw.integers(1, 5)) if size > 64 else 1
        letters = draw.choice(list("abcdefghijklmnopqrstuvwxyz "), int(size))
        parts = np.split(letters, (np.arange(1, 3 * turns) * len(letters) / (3 * turns)).astype(int))
        texts = [
            "".join(np.concatenate(parts[3 * n + a : 3 * n + b])) for n in range(turns) for a, b in ((0, 1), (1, 3))
        ]
        yield [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# --- the contenders ---------------------------------------------------------------------------------------------------


def ours(folder: Path, done: Done) -> None:
    """This trainer's steps, without its log and checkpoints."""
    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()

    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.step import train_step

    run = setup.prepare(load_experiment(folder / "experiment.yaml"))
    read, batches = run.loader.micro_batches, []

    def kept(step: int) -> Any:
        batches[:] = read(step)
        return list(batches)

    run.loader.micro_batches = kept  # type: ignore[method-assign]
    with setup.left_at_the_end(run):
        for step in range(run.loader.num_steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            apply_learning_rate(run, step)
            train_step(run, run.schedule.stage(step), step)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            tokens = sum(int((batch.tokens_T != run.loader.pad_id).sum()) for batch in batches)
            targets = sum(int(batch.loss_mask_T.sum()) for batch in batches)
            if not done(Step(seconds, cpu_seconds, tokens, targets, sum(len(batch.tokens_T) for batch in batches))):
                return


def peer(folder: Path, done: Done, **options: Any) -> None:
    """The steps of SFTTrainer, in its own loop."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    micro_batches: list[dict[str, Any]] = []

    class Watched(trl.SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any) -> Any:
            micro_batches.append(
                {name: inputs[name] for name in ("input_ids", "labels", "attention_mask") if name in inputs}
            )
            return super().training_step(model, inputs, *arguments)

    class Turns(TrainerCallback):  # type: ignore[misc]
        started, cpu_started = 0.0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.cpu_started = time.perf_counter(), time.process_time()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> Any:
            seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
            positions = sum(batch["input_ids"].numel() for batch in micro_batches)
            padding = sum(
                int((batch["attention_mask"] == 0).sum()) for batch in micro_batches if "attention_mask" in batch
            )
            targets = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
            micro_batches.clear()
            control.should_training_stop = not done(Step(seconds, cpu_seconds, positions - padding, targets, positions))
            self.started, self.cpu_started = time.perf_counter(), time.process_time()
            return control

    settings = trl.SFTConfig(
        **({"max_length": None} | options),
        output_dir=str(folder / "trl"),
        max_steps=10_000,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    records = [json.loads(line) for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    Watched(
        model=AutoModelForCausalLM.from_pretrained(folder / "export", trust_remote_code=True),
        args=settings,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder / "export", trust_remote_code=False),
        callbacks=[Turns()],
    ).train()


def worker(name: str, folder: Path) -> None:
    """Answer every line on stdin (a number of steps) with these steps as JSON; the first step needs no line."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(THREADS)
    wanted, steps = 1, []

    def done(step: Step) -> bool:
        nonlocal wanted
        steps.append(step)
        if len(steps) == wanted:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(json.dumps({"steps": steps, "peak_mib": peak}), flush=True)
            steps.clear()
            wanted = int(sys.stdin.readline() or 0)
        return wanted > 0

    if name == OURS:
        ours(folder, done)
    else:
        peer(folder, done, **TRL[name])


# --- taking turns -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--only", nargs="*", choices=[OURS, *TRL], default=[OURS, *TRL])
    parser.add_argument("--json", help="also write all steps to this file")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], Path(arguments.worker[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.conversations)
        rounds, peaks = take_turns(Path(folder), arguments.only, arguments.rounds, arguments.steps)
    print_table(rounds, peaks)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rounds, indent=1), encoding="utf-8")


def take_turns(
    folder: Path, names: list[str], num_rounds: int, num_steps: int
) -> tuple[dict[str, list[list[Step]]], dict[str, float]]:
    """(the steps of each contender by round, the peak memory of each in MiB)."""
    peers = Path(os.environ.get("PACKAGE_FOLDERS", sys.prefix)) / "peers"
    environment = os.environ | {
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    processes, rounds, peaks = {}, {name: [] for name in names}, {}
    for name in names:  # one after the other, so that start-up times do not disturb each other
        places = [str(ROOT)] if name == OURS else [str(peers), str(ROOT)]
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.sft_against_trl", "--worker", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": os.pathsep.join(places)},
        )
        answer(name, processes[name])
    for number in range(num_rounds):
        for name, process in processes.items():
            process.stdin.write(f"{num_steps}\n")
            process.stdin.flush()
            found = answer(name, process)
            rounds[name].append([Step(*step) for step in found["steps"]])
            peaks[name] = found["peak_mib"]
        print(f"round {number + 1}: load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return rounds, peaks


def answer(name: str, process: subprocess.Popen[str]) -> Any:
    """The next line of JSON of a worker; trainers print other lines too."""
    for line in process.stdout:
        if line.startswith('{"steps"'):
            return json.loads(line)
    sys.exit(f"{name}: ended early; see its output above")


def print_table(rounds: dict[str, list[list[Step]]], peaks: dict[str, float]) -> None:
    """Medians over the rounds."""

    def rates(name: str, what: str, of: str = "seconds") -> list[float]:
        return [sum(getattr(s, what) for s in steps) / sum(getattr(s, of) for s in steps) for steps in rounds[name]]

    def ratio(name: str, of: str) -> float:
        pairs = zip(rates(OURS, "tokens", of), rates(name, "tokens", of), strict=True) if OURS in rounds else []
        return statistics.median([mine / theirs for mine, theirs in pairs] or [float("nan")])

    titles = ("tokens/s", "targets/s", "ours / it", "CPU time", "padding", "tokens a step", "MiB")
    print(f"{'':18}" + "".join(f" {title:>13}" for title in titles))
    for name, found in rounds.items():
        steps = [step for each in found for step in each]
        positions, tokens = (sum(getattr(step, what) for step in steps) for what in ("positions", "tokens"))
        columns = [
            f"{statistics.median(rates(name, 'tokens')):,.0f}",
            f"{statistics.median(rates(name, 'targets')):,.0f}",
            f"{ratio(name, 'seconds'):.2f}",
            f"{ratio(name, 'cpu_seconds'):.2f}",
            f"{1 - tokens / positions:.0%}",
            f"{tokens / len(steps):,.0f}",
            f"{peaks[name]:,.0f}",
        ]
        print(f"{name:18}" + "".join(f" {column:>13}" for column in columns))


if __name__ == "__main__":
    main()
