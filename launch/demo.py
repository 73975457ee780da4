"""The demo: train a model on text, stop it, resume it, export it and generate from it, with the commands that a user
would type.

    python -m launch.demo [--text FILE_OR_FOLDER] [--output FOLDER] [KEY=VALUE]...

Each command line is printed before it runs. KEY=VALUE settings override those in configs/dev/demo_cpu.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.exit_status import EXIT_DONE, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_STOPPED
from hunyuan_pretrain.config.extras import install_hint
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from launch.demo_report import Metrics, measure_heldout, plot_losses, print_tables
from launch.demo_text import DemoError, read_text, write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/dev/demo_cpu.yaml"
MARKER = ".hunyuan_demo"
VOCAB_SIZE = 4096
HOLDOUT_EVERY = 40
STOP_AT = 0.4
"""Fraction of the steps after which the run is told to stop."""
LAUNCH_SETTINGS = (
    *("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "LOCAL_ADDR"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)
"""Variables that are removed from the environment: if they are set, they were meant for another run."""
PROMPT = "class Reader:\n    def __init__(self"
SAMPLING = ("--max-new-tokens", "80", "--temperature", "0.8", "--top-p", "0.9", "--repetition-penalty", "1.15")

GREEDY_TOKENS = 24
LOAD_BACK = """\
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
ids = tokenizer("import sys\\n", return_tensors="pt").input_ids
loss = model(ids, labels=ids).loss.item()
print(f"{{type(model).__name__}} {{model.num_parameters():,}} parameters, loss of a line {{loss:.3f}}")
ids = tokenizer({prompt!r}, return_tensors="pt").input_ids
length, stops = ids.shape[1], model.generation_config.eos_token_id
with torch.inference_mode():
    while ids.shape[1] < length + {tokens} and (ids.shape[1] == length or ids[0, -1] not in stops):
        logits = model(ids, use_cache=False).logits[0, -1, : len(tokenizer)]
        ids = torch.cat((ids, logits.argmax()[None, None]), 1)
print("greedy, without a cache:", json.dumps(tokenizer.decode(ids[0, length:], skip_special_tokens=True)))"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo", description="From text to a trained and exported model, on two CPU processes."
    )
    parser.add_argument(
        "--text",
        help="your own text: a file, or a folder of .txt, .md, .rst and .py; default: Python's standard library",
    )
    parser.add_argument(
        "--output", default="demo_out", help="output folder; replaces an earlier demo's output (default: demo_out)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as optimizer.lr=1e-3")
    options = parser.parse_intermixed_args(arguments)
    try:
        Demo(options.text, Path(options.output), options.overrides).run()
    except (DemoError, ConfigError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE


class Demo:
    """One demo. The constructor raises DemoError or ConfigError, before anything is written, if it cannot run."""

    def __init__(self, text: str | None, output: Path, overrides: Sequence[str]) -> None:
        if not CONFIG.is_file():
            raise DemoError(f"{CONFIG}: no such file; the demo runs in a checkout of the repository")
        self.output = output
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        self.config = _short(CONFIG)
        self.overrides = [*self._moved_paths(), *overrides]
        self.experiment = load_experiment(CONFIG, self.overrides)
        self.seconds: list[tuple[str, float]] = []
        if output.exists() and not (output / MARKER).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise DemoError(f"{output}: already exists, and was not written by the demo; choose another --output")
        for module in ("tokenizers", "zstandard", "transformers", "matplotlib"):
            if find_spec(module) is None:
                raise DemoError(f"{module} is not installed: {install_hint(module)}")
        self.text = read_text(text)

    def run(self) -> None:
        """Run all parts in order. Raises DemoError if one fails."""
        with self._part("text and tokenizer"):
            self._prepare_output()
            self._run(
                "hunyuan-data",
                "train-tokenizer",
                self._at("text.jsonl"),
                "--vocab-size",
                VOCAB_SIZE,
                "--output",
                self._at("tokenizer"),
            )
        with self._part("tokenize and pack"):
            self._tokenize_and_pack()
        with self._part(f"train to {STOP_AT:.0%}, then SIGTERM"):
            stopped_at = self._train_and_stop()
        with self._part("resume and finish"):
            self._train_to_the_end(stopped_at)
        with self._part("export and load back"):
            self._run("hunyuan-pretrain", "export", self.experiment.run_dir, self._at("model"))
            script = LOAD_BACK.format(folder=self._at("model"), prompt=PROMPT, tokens=GREEDY_TOKENS)
            expected = self._run("python", "-c", script, capture=True)
        with self._part("generate"):
            greedy = self._generate("--max-new-tokens", str(GREEDY_TOKENS), "--temperature", "0")
            check_greedy(expected, greedy)
            sample = self._generate(*SAMPLING)
        self._report(stopped_at, sample)

    def _prepare_output(self) -> None:
        self.console.print(
            f"{self.text.origin}: {len(self.text.documents):,} documents, {self.text.utf8_bytes / 1e6:.1f} MB of text"
        )
        if self.output.exists():
            shutil.rmtree(self.output)
        self.output.mkdir(parents=True)
        (self.output / MARKER).write_text("Written by launch/demo.py, which may replace this folder.\n")
        write_text(self.text, self.output / "text.jsonl")

    def _tokenize_and_pack(self) -> None:
        train, heldout = self._at("tokens/train"), self._at("tokens/heldout")
        holdout = ("--holdout-every", HOLDOUT_EVERY, "--holdout-output", heldout)
        self._run(
            "hunyuan-data",
            "tokenize",
            self._at("text.jsonl"),
            "--tokenizer",
            self._at("tokenizer"),
            "--output",
            train,
            *holdout,
        )
        length = self.experiment.stages[0].sequence_length
        self._run("hunyuan-data", "pack", train, "--sequence-length", length, "--output", self._at("packed/train"))
        self._run("hunyuan-data", "pack", heldout, "--sequence-length", length, "--output", self._at("packed/heldout"))
        self._run(
            "hunyuan-data", "inspect", self._at("packed/heldout"), "--samples", 1, "--tokenizer", self._at("tokenizer")
        )

    def _train_command(self) -> list[str]:
        return [_short(ROOT / "launch/train.sh"), self.config, *self.overrides]

    def _train_and_stop(self) -> int:
        """Train for STOP_AT of the steps, send SIGTERM as a cluster would, and return the saved step."""
        command = self._train_command()
        self._announce(command)
        num_steps = _num_steps(self.experiment)
        process = subprocess.Popen(command, env=_environment())
        try:
            while process.poll() is None and self._last_step() < STOP_AT * num_steps:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            _end(process)
        if status != EXIT_STOPPED:
            raise DemoError(f"the run that was told to stop exited with status {status}, not {EXIT_STOPPED}")
        stopped_at = _last_checkpoint(Path(self.experiment.run_dir))
        self.console.print(
            f"[bold]status {status}: stopped by SIGTERM, saved after step {stopped_at}.[/bold] Now the same "
            "command again:"
        )
        return stopped_at

    def _train_to_the_end(self, stopped_at: int) -> None:
        self._run(*self._train_command())
        log = (Path(self.experiment.run_dir) / "log.txt").read_text(encoding="utf-8")
        if f"steps {stopped_at + 1} to" not in log:
            raise DemoError(
                f"the second run did not resume from step {stopped_at}; see {self.experiment.run_dir}/log.txt"
            )
        if _last_checkpoint(Path(self.experiment.run_dir)) != _num_steps(self.experiment):
            raise DemoError("the second run did not save its last step")

    def _generate(self, *options: str) -> str:
        return self._run("hunyuan-pretrain", "generate", self._at("model"), "--prompt", PROMPT, *options, capture=True)

    def _report(self, stopped_at: int, sample: str) -> None:
        metrics = Metrics.read(Path(self.experiment.run_dir))
        heldout = measure_heldout(self.experiment, self.output / "tokens/train")
        found = metrics.validations[-1]["validation_target_tokens"]
        if found != heldout.target_tokens:
            raise DemoError(
                f"validation predicted {found:,} tokens, but {heldout.target_tokens:,} are in "
                f"{self.experiment.evaluation.data}"
            )
        plot_losses(self.output / "loss.png", metrics, self.experiment, heldout, stopped_at)
        self._run("hunyuan-pretrain", "report", self.experiment.run_dir)
        self.console.rule("report", align="left")
        print_tables(self.console, metrics, heldout, stopped_at, self.seconds)
        self.console.print(
            "[bold]sample[/bold] (a small model after minutes of training: it looks like Python but makes no sense)"
        )
        self.console.print(escape(PROMPT + sample.rstrip()), style="cyan")
        self.console.print(
            f"\nloss curve: {self.output}/loss.png    the run as a page: {self.experiment.run_dir}/report.html\n"
            f"all files of the run: {self.experiment.run_dir}\n\n[bold]next[/bold]"
        )
        for line in (
            f"hunyuan-pretrain generate {self._at('model')} --prompt 'class Reader:' --temperature 0",
            f"hunyuan-pretrain serve {self._at('model')}  # then open http://127.0.0.1:8000/",
            f"hunyuan-pretrain plan {self.config} model.num_moe_experts=16",
            "hunyuan-pretrain explain model.recycle_routing",
            f"{_short(ROOT / 'launch/train.sh')} {self.config} run_dir={self._at('run2')} model.recycle_routing=false",
            "make demo TEXT=a_folder_of_your_own",
        ):
            self.console.print(f"  {line}", soft_wrap=True, markup=False)

    # --- running commands ---------------------------------------------------------------------------------------------

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.console.rule(name, align="left")
        yield
        self.seconds.append((name, time.perf_counter() - started))

    def _run(self, *command: object, capture: bool = False) -> str:
        """Print a command line and run it; with `capture`, return its stdout. Raises DemoError if it fails."""
        words = [str(word) for word in command]
        self._announce(words)
        if words[0] == "python":
            words[0] = sys.executable
        process = subprocess.Popen(words, env=_environment(), stdout=subprocess.PIPE if capture else None, text=True)
        printed = []
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                printed.append(line)
            status = process.wait()
        finally:
            _end(process)
        if status != 0:
            raise DemoError(f"{words[0]} {words[1]} exited with status {status}; see its output above")
        return "".join(printed)

    def _announce(self, command: Sequence[str]) -> None:
        self.console.print(f"$ {shlex.join(command)}", style="bold green", soft_wrap=True, markup=False)
        sys.stdout.flush()

    def _at(self, name: str) -> str:
        return str(self.output / name)

    def _moved_paths(self) -> list[str]:
        """Overrides for an output folder other than demo_out: they move what configs/dev/demo_cpu.yaml reads and
        writes."""
        if str(self.output) == "demo_out":
            return []
        stages = range(len(load_experiment(CONFIG).stages))
        return [
            f"run_dir={self._at('run')}",
            f"tokenizer={self._at('tokenizer')}",
            f"evaluation.data={self._at('packed/heldout')}",
            *(f"stages.{i}.data.0.path={self._at('packed/train')}" for i in stages),
        ]

    def _last_step(self) -> int:
        """The last step in metrics.jsonl; 0 before the first."""
        path = Path(self.experiment.run_dir) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:  # a line that is being written
                continue
        return 0


def check_greedy(without_a_cache: str, generated: str) -> None:
    """Compare the greedy continuation by `generate` with the one by transformers, computed token by token without a
    cache.

    without_a_cache: the output of LOAD_BACK. Raises DemoError if they differ, because a sample from `generate` would
    then not come from this model.
    """
    expected = json.loads(without_a_cache.splitlines()[-1].partition(": ")[2])
    if generated.removesuffix("\n") != expected:
        raise DemoError(
            f"the greedy continuation of the prompt is {generated!r} by `generate`, which keeps a cache, but "
            f"{expected!r} without a cache; "
            "one of them is not what the model computes"
        )


def _num_steps(experiment: Experiment) -> int:
    return sum(stage.num_steps for stage in experiment.stages)


def _last_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint. Raises DemoError if there is none."""
    markers = sorted((run_dir / "checkpoints").glob("step_*/complete.json"))
    if not markers:
        raise DemoError(f"{run_dir}: no complete checkpoint")
    return int(json.loads(markers[-1].read_text(encoding="utf-8"))["step"])


def _environment() -> dict[str, str]:
    """The environment of the commands: this interpreter's scripts come first on PATH, Hugging Face libraries are
    offline and show no progress bars, and another job's variables are removed."""
    others = {name: value for name, value in os.environ.items() if name not in LAUNCH_SETTINGS}
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **others,
        "HUNYUAN_PYTHON": sys.executable,
    }
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return environment


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Terminate a command that an exception left running."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def _short(path: Path) -> str:
    """A path as a user would type it in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
