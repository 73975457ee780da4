"""`hunyuan-pretrain init`: an experiment for given GPUs, data and tokens, as commented YAML.

The model comes from configs/model/, the stages and the shares of data from configs/base/pretrain_4k.yaml, the layout
from plan.choice.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from hunyuan_pretrain.config.describe import first_sentence
from hunyuan_pretrain.config.errors import NUMBER, ConfigError, Problem
from hunyuan_pretrain.config.load import read_file, validate
from hunyuan_pretrain.config.rules import check
from hunyuan_pretrain.config.schema import DataSource, Experiment, Section, StageConfig
from hunyuan_pretrain.config.training_rules import total_steps
from hunyuan_pretrain.config.values import SUFFIX_RULE, SUFFIXES, change_paths, token_count
from hunyuan_pretrain.config.yaml_tree import Dumper, parse
from hunyuan_pretrain.plan.choice import fastest, highest_peak, smallest_cluster
from hunyuan_pretrain.plan.hardware import Hardware, load, names

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"tiny": 64, "300m": 256, "7b": 1024, "large": 4096}
"""Size, as in the names of configs/model/hunyuan_*.yaml -> sequences in a global batch, as in the recipes after their
warmup."""
FEWEST_STEPS = 100
"""The warmup is 1% of the tokens, and a stage has at least one step."""


@dataclass(frozen=True)
class Request:
    """What `init` was asked for, as it was written."""

    size: str
    gpus: int
    hardware: str
    data: Path
    tokens: str
    output: Path

    def command(self) -> str:
        """The command line."""
        words = ["hunyuan-pretrain", "init"]
        for name in ("size", "gpus", "hardware", "data", "tokens", "output"):
            words += [f"--{name}", str(getattr(self, name))]
        return shlex.join(words)


def new_experiment(request: Request) -> str:
    """The text of the experiment file. Raises ConfigError with everything that is wrong with the request, or if the
    model fits no layout of these GPUs."""
    hardware, tokens = _checked(request)
    start = _without_layout(request, tokens, hardware)
    found = fastest(start, request.gpus, hardware)
    if found is None:
        enough = smallest_cluster(start, hardware)
        rule = f"size {request.size} does not fit into the memory of {request.gpus} x {hardware.name}"
        hint = f"use {enough} or more, or a smaller size" if enough else "use a smaller size, or larger GPUs"
        raise ConfigError("init", [Problem("--gpus", request.gpus, rule, hint)])
    if total_steps(found) < FEWEST_STEPS:
        batch = found.stages[0].global_batch_tokens
        rule = f"{total_steps(found)} steps of {batch:,} tokens; a schedule needs at least {FEWEST_STEPS}"
        raise ConfigError(
            "init", [Problem("--tokens", request.tokens, rule, f"use {count_text(FEWEST_STEPS * batch)}")]
        )
    found = _with_intervals(found)
    text = "\n".join(_lines(found, request, hardware)) + "\n"
    assert validate(Experiment, parse(text, str(request.output))) == found, "the text is the experiment"
    check(found, request.gpus)
    return text


def check_new(path: Path, command: str = "init", option: str = "--output") -> None:
    """Raise ConfigError if `write_new` would."""
    write_new(path, "", command, option)
    path.unlink()


def write_new(path: Path, text: str, command: str = "init", option: str = "--output") -> None:
    """Write a file that does not exist yet, all of it or none. Raises ConfigError, which names command and option."""
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise
    except OSError as error:
        hint = "choose another name, or remove the file" if isinstance(error, FileExistsError) else ""
        raise ConfigError(command, [Problem(option, str(path), f"{error.strerror}", hint)]) from None


def _checked(request: Request) -> tuple[Hardware, int]:
    """The hardware profile and the number of tokens. Raises ConfigError with all problems."""
    problems = []
    if not CONFIGS.is_dir():
        rule = "no such folder; init runs in a checkout of the repository"
        problems.append(Problem("configs", str(CONFIGS), rule))
    if request.size not in SIZES:
        problems.append(Problem("--size", request.size, "unknown size", f"use {', '.join(SIZES)}"))
    short = {name.partition("-")[0].lower(): name for name in names()}
    hardware: Hardware | None = None
    try:
        hardware = load(short.get(request.hardware.lower(), request.hardware))
    except ConfigError as error:
        problems += [replace(problem, path="--hardware") for problem in error.problems]
    if hardware is not None and (hint := _servers(request.gpus, hardware.node_gpus)):
        problems.append(Problem("--gpus", request.gpus, f"not whole servers of {hardware.node_gpus}", hint))
    tokens = token_count(request.tokens)
    if tokens is None and NUMBER.fullmatch(request.tokens):
        tokens = int(float(request.tokens.replace("_", "")))
    if not isinstance(tokens, int) or tokens < 1:
        problems.append(Problem("--tokens", request.tokens, "must be a number of tokens", SUFFIX_RULE))
    if request.output.exists():
        problems.append(Problem("--output", str(request.output), "File exists", "choose another name, or remove it"))
    if problems or hardware is None or not isinstance(tokens, int):
        raise ConfigError("init", problems)
    return hardware, tokens


def _servers(gpus: int, node: int) -> str:
    """A hint with the nearest numbers of GPUs that are whole servers, or a part of one that divides it; "" if it is."""
    legal = [size for size in range(1, node) if node % size == 0]
    if gpus in legal or (gpus > 0 and gpus % node == 0):
        return ""
    near = [size for size in (*legal, node, gpus // node * node, (gpus // node + 1) * node) if size > 0]
    below, above = max((size for size in near if size < gpus), default=None), min(size for size in near if size > gpus)
    return f"use {above}" if below is None else f"use {below} or {above}"


def _without_layout(request: Request, tokens: int, hardware: Hardware) -> Experiment:
    """The experiment on any number of ranks, with the global batch of its size."""
    tree = read_file(CONFIGS / "model" / f"hunyuan_{request.size}.yaml", ())
    tree.merge(read_file(CONFIGS / "base" / "pretrain_4k.yaml", ()))
    data = tree.data
    hidden, anneal, warmup = data["model"]["hidden_size"], tokens * 5 // 100, tokens // 100
    length = 512 if request.size == "tiny" else 4096
    folder = _as_written(request.data)
    inside, beside = request.data / "tokenizer", request.data.parent / "tokenizer"
    tokenizer = _as_written(inside if inside.is_dir() else beside)
    data |= {"name": request.output.stem, "run_dir": f"runs/{request.output.stem}", "tokenizer": tokenizer}
    data["optimizer"]["lr"] = float(f"{1e-3 * math.sqrt(256 / hidden):.2g}")
    for stage, count in zip(data["stages"], (warmup, tokens - warmup - anneal, anneal), strict=True):
        stage |= {"tokens": max(count, 1), "sequence_length": length, "global_batch_sequences": SIZES[request.size]}
        _fill(stage, request.data, folder)
    held_out = Path(request.data) / "heldout"
    sets = [{"name": Path(data["evaluation"]["data"]).name}, *data["evaluation"]["sets"]]
    present = [one["name"] for one in sets if not request.data.is_dir() or (held_out / one["name"]).is_dir()]
    data["evaluation"] |= {
        "data": f"{folder}/heldout/{present[0]}" if present else None,
        "sets": [{"name": name, "path": f"{folder}/heldout/{name}"} for name in present[1:]],
    }
    if request.size == "tiny":
        del data["runtime"]  # it also trains on a CPU
    else:
        if hardware.peak_mxfp8_flops_per_s is not None:
            data["runtime"]["deterministic"] = False
        if tokens < 10**12:
            del data["runtime"]["verify_data"]
    return validate(Experiment, tree)


def _as_written(path: Path) -> str:
    """A path as a file holds it: a dollar that is not the start of a variable is written twice."""
    return str(path).replace("$", "$$")


def _fill(stage: dict[str, Any], data: Path, folder: str) -> None:
    """Put the sources of a stage into the user's folder: those that are there, or all of them if there is none yet."""
    if (data / "manifest.json").is_file():  # itself a packed dataset
        stage |= {"data": [{"path": folder}], "tier_weights": None}
        return
    roles = {Path(source["path"]).name: source for source in stage["data"]}
    present = {role: source for role, source in roles.items() if (data / role).is_dir()} or roles
    sources = [source | {"path": f"{folder}/{role}"} for role, source in present.items()]
    tiers = {source["tier"] for source in sources if "tier" in source}
    if len(tiers) < 2:
        sources = [{key: value for key, value in source.items() if key != "tier"} for source in sources]
    kept = {tier: share for tier, share in (stage.get("tier_weights") or {}).items() if tier in tiers}
    stage |= {"data": sources, "tier_weights": kept if len(tiers) > 1 else None}


def _with_intervals(experiment: Experiment) -> Experiment:
    """Validation and checkpoints also in a short run: about ten of each."""
    often = max(1, total_steps(experiment) // 10)
    checkpoint, evaluation = experiment.checkpoint, experiment.evaluation
    return experiment.model_copy(
        update={
            "checkpoint": checkpoint.model_copy(
                update={"save_every_steps": min(checkpoint.save_every_steps or often, often)}
            ),
            "evaluation": evaluation.model_copy(update={"every_steps": min(evaluation.every_steps, often)}),
        }
    )


# --- as text ----------------------------------------------------------------------------------------------------------

NOTES = {
    "optimizer.lr": "peak: 1e-3 x sqrt(256 / hidden_size), this project's rule",
    "optimizer.cpu_offload_fraction": "the GPUs have no room for the optimizer state",
    "parallel.world_size": "GPUs of the job",
    "parallel.recompute": "the least that fits",
    "runtime.device": "an error without a GPU",
    "runtime.transformer_engine": "an error instead of layers without its kernels",
    "runtime.deterministic": "true would exclude cuDNN's attention, which is not deterministic on Blackwell",
    "runtime.verify_data": "so many tokens take long to read; run `hunyuan-data verify` once",
}


def _lines(experiment: Experiment, request: Request, hardware: Hardware) -> Iterator[str]:
    peak = highest_peak(experiment, request.gpus)
    yield f"# Written by: {request.command()}"
    yield f"# The plan puts the fullest GPU at {peak.total / 2**30:.0f} of {hardware.memory_bytes / 2**30:.0f} GiB."
    yield f"# Look at it:  hunyuan-pretrain plan {request.output} --hardware {hardware.name}"
    yield f"# Its data:    hunyuan-data mix {request.output}"
    yield f"# Train:       launch/train.sh {request.output}"
    yield ""
    # in a file, a dollar that is not the start of a variable is written twice
    fields = change_paths(Experiment, experiment.model_dump(), lambda path: path.replace("$", "$$"))
    experiment = Experiment.model_validate(fields)
    yield from _settings(experiment, "", "")
    for name in Experiment.model_fields:
        value = getattr(experiment, name)
        if name == "stages":
            yield from _stages(experiment)
        elif isinstance(value, Section) and (lines := list(_settings(value, f"{name}.", "  "))):
            yield from ("", f"{name}:", *lines)


def _settings(section: Section, path: str, indent: str) -> Iterator[str]:
    """The settings of a section that differ from their defaults, each with its meaning."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = field.get_default(call_default_factory=True)
        if name == "stages" or isinstance(value, Section) or (default is not PydanticUndefined and value == default):
            continue
        shown = section.model_dump(mode="json", exclude_unset=name == "sets")[name]
        meaning = NOTES.get(path + name) or first_sentence(field.description or "")
        if name == "sets":
            yield f"{indent}{name}: # {meaning}"
            yield from (f"{indent}  - {_value(one)}" for one in shown)
        else:
            yield f"{indent}{name}: {_value(shown)} # {meaning}"


STAGE_NOTES = {
    "warmup": "1% of the tokens",
    "decay": "slowly down",
    "anneal": "the last 5%, on the best data, to a tenth of the peak (report, arXiv 2411.02265, 2.3)",
}


def _stages(experiment: Experiment) -> Iterator[str]:
    first = experiment.stages[0]
    yield from ("", "stages:")
    for stage in experiment.stages:
        batch = f"{stage.global_batch_tokens:,} tokens"
        yield f"  - name: {stage.name} # {STAGE_NOTES[stage.name]}"
        yield f"    tokens: {count_text(stage.num_tokens)}"
        yield f"    sequence_length: {'&length ' + str(stage.sequence_length) if stage is first else '*length'}"
        sequences = stage.global_batch_sequences
        yield f"    global_batch_sequences: {f'&batch {sequences} # {batch}' if stage is first else '*batch'}"
        yield f"    micro_batch_sequences: {f'&micro {stage.micro_batch_sequences}' if stage is first else '*micro'}"
        yield f"    lr_end: {stage.lr_end}"
        yield f"    lr_shape: {stage.lr_shape}"
        if stage.tier_weights:
            yield f"    tier_weights: {_value(stage.tier_weights)} # shares of the tokens"
        yield from _sources(stage, first)


def _sources(stage: StageConfig, first: StageConfig) -> Iterator[str]:
    if stage is not first and stage.data == first.data:
        yield "    data: *general"
        return
    yield "    data:" + (" &general # weights are shares of the tokens" if stage is first else "")
    for source in stage.data:
        yield f"      - {_value(_written(source))}"


def _written(source: DataSource) -> dict[str, Any]:
    """The settings of a source that differ from their defaults."""
    return source.model_dump(exclude_defaults=True)


def _value(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.dump(
        value, Dumper=Dumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.strip().removesuffix("...").strip()


def count_text(count: int) -> str:
    """A number of tokens with a suffix if that is exact: 2.82B."""
    for suffix in ("T", "B", "M", "k"):
        text = f"{count / SUFFIXES[suffix]:.6g}{suffix}"
        if count >= SUFFIXES[suffix] and "e" not in text and token_count(text) == count:
            return text
    return str(count)
