"""A hardware profile with measured figures, as commented YAML, and the profile that gives the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from typing import Any, NamedTuple

import torch

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.plan.hardware import Achieved, Format, Hardware, load, names
from hunyuan_pretrain.plan.matmuls import Matmul
from hunyuan_pretrain.plan.peaks import peak_flops_per_s

UNMEASURED = (
    "peaks, bandwidths of memory, NVLink, network and host, sizes of domains and hosts, watts, attention, gaps between "
    "kernels"
)


class Figure(NamedTuple):
    """A number of a profile."""

    value: float
    source: str


class Shape(NamedTuple):
    """(rows, inputs) times (inputs, outputs)."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.inputs} x {self.outputs}"

    @property
    def left(self) -> tuple[int, int]:
        return self.rows, self.inputs

    @property
    def right(self) -> tuple[int, int]:
        return self.inputs, self.outputs

    @property
    def flops(self) -> float:
        """A multiply-add counts as 2."""
        return 2.0 * self.rows * self.inputs * self.outputs


def nearest(gpu: str | None, hardware: str) -> Hardware:
    """The profile `hardware`, or the one that comes with the project for a GPU of this name; None: there is no GPU.
    Raises ConfigError if there is none: nothing is made up."""
    if hardware:
        return load(hardware)
    words, peak = (gpu or "").replace("-", " ").split(), peak_flops_per_s(gpu or "")
    for name in names():
        # a PCIe card of the same name has another peak
        if name.partition("-")[0] in words and (found := load(name)).peak_bf16_flops_per_s == peak:
            return found
    rule = f"no profile comes with the project for {gpu or 'a CPU'}, and {UNMEASURED} cannot be measured"
    hint = f"name a profile that has them: {', '.join(names())}, or a YAML file"
    raise ConfigError("plan", [Problem("--hardware", Problem.NO_VALUE, rule, hint)])


def profile(
    base: Hardware, figures: dict[str, Figure], where: str, rates: list[tuple[Format, Shape, float]]
) -> tuple[str, list[tuple[str, str, str]]]:
    """(YAML that plan.hardware.load reads, rows of (figure, value, source)). `figures`: by dotted name; the others are
    those of `base`. `rates`: (format, shape, FLOP/s), for comments."""
    name = f"{where}, measured"
    values = _with(base, name, figures)
    lines = [
        f"# Written by `hunyuan-pretrain plan --calibrate` on {date.today()}: {where}, torch {torch.__version__}.",
        "# A share under `achieved`, times the peak above that it is of, is the speed that was measured or taken over.",
        f"name: {json.dumps(name)}",
        *_lines(Hardware, values.model_dump(), figures, base.name, ""),
        "achieved:",
        *_lines(Achieved, values.achieved.model_dump(), figures, base.name, "achieved."),
        "# Matmuls, rows x inputs x outputs: TFLOP/s measured, and as the plan computes it with this profile.",
        *_compared(values, rates),
    ]
    rows = [(key, _text(figure.value), figure.source) for key, figure in figures.items()]
    return "\n".join(lines) + "\n", rows


def _with(base: Hardware, name: str, figures: dict[str, Figure]) -> Hardware:
    data = base.model_dump() | {"name": name}
    for key, figure in figures.items():
        section, _, field = key.rpartition(".")
        (data[section] if section else data)[field] = figure.value
    return Hardware.model_validate(data)


def _lines(
    section: type[Hardware | Achieved], values: dict[str, Any], figures: dict[str, Figure], base: str, prefix: str
) -> Iterator[str]:
    for field in section.model_fields:
        if field in ("name", "achieved"):
            continue
        figure = figures.get(prefix + field)
        source = figure.source if figure else f"taken over from {base}"
        text = _text(figure.value) if figure else _exact(values[field])
        yield f"{'  ' if prefix else ''}{field}: {text} # {' '.join(source.split())}"


def _exact(value: float | None) -> str:
    """As YAML, with no digit lost."""
    if value is None:
        return "null"
    return short if float(short := f"{value:.12g}") == value else repr(value)


def _text(value: float) -> str:
    """A measured number: all of an integer, four digits of any other."""
    return f"{value:_}" if isinstance(value, int) else f"{value:.4g}"


def _compared(hardware: Hardware, rates: list[tuple[Format, Shape, float]]) -> Iterator[str]:
    for number_format, shape, rate in rates:
        planned = shape.flops / Matmul("", *shape, 1, number_format).seconds(hardware)
        yield f"# {number_format} {shape}: {rate / 1e12:.4g}, {planned / 1e12:.4g}"
