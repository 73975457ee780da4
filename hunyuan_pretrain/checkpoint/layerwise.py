"""Compares two models layer by layer, each with one layer in memory: two sources of the same layers.

A source runs a model over texts and shows every layer to a visitor. The reference runs first; the hidden states between
its layers go into a temporary file. Then the candidate runs, twice in each layer: on its own hidden states, which shows
how far errors add up, and on the reference's, which shows the error of this layer alone. So an error in one layer of
many cannot hide among the rounding errors of the others.

Shapes: T tokens of all texts, D hidden size, V padded vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.tensor_files import bytes_of, read_into
from hunyuan_pretrain.checkpoint.workers import Progress, Say

__all__ = ["LayerComparison", "LayerSource", "Visit", "compare_layers"]

Again = Callable[[Tensor], Tensor]
"""Runs the visited layer on other hidden states (T, D). A layer that borrows keys and values attends to those that its
owner computed when it was run again."""


Visit = Callable[[int, Tensor, Tensor, Again], None]
"""Called after each layer with its number, its input and its output (T, D), and `again`, to be called until it
returns."""


class LayerSource(Protocol):
    """A model of which one layer at a time is in memory."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    def walk(self, texts: Sequence[Tensor], visit: Visit) -> Tensor:
        """Run the model without a cache over texts (token ids (S,) each) that do not attend to each other, routed
        without a capacity. Returns the logits (T, V)."""


class LayerComparison(NamedTuple):
    """What `compare_layers` measured."""

    layers: list[dict[str, Any]]
    """For each layer: the relative difference of what it adds, at the median and worst position, and the share of
    positions above `outlier`; and that of the hidden states of both models run on their own (`accumulated`)."""
    reference_TV: Tensor
    candidate_TV: Tensor
    """Logits of both models, each run on its own."""


@torch.inference_mode()
def compare_layers(
    reference: LayerSource,
    candidate: LayerSource,
    texts: Sequence[Tensor],
    scratch: Path,
    outlier: float,
    say: Say | None = None,
) -> LayerComparison:
    """Run both sources once over the texts.

    scratch: a folder for a temporary file of (layers + 1) x T x D numbers. The difference at a position is
    norm(candidate's update - reference's update) / norm(reference's update), where a layer's update is its output minus
    its input, both get the reference's input, and an update counts as no smaller than SMALL_UPDATE says. Raises
    CheckpointError if the models differ in their number of layers, OSError.
    """
    if reference.num_layers != candidate.num_layers:
        raise CheckpointError(f"{candidate.num_layers} layers, the model it came from has {reference.num_layers}")
    layers: list[dict[str, Any]] = []
    progress = Progress("comparing layers", 2 * reference.num_layers, say)
    with _HiddenStates(scratch) as kept:

        def keep(layer: int, before_TD: Tensor, after_TD: Tensor, _again: Again) -> None:
            if layer == 0:
                kept.append(before_TD)
            kept.append(after_TD)
            progress.add(1)

        def compare(layer: int, before_TD: Tensor, after_TD: Tensor, again: Again) -> None:
            input_TD, expected_TD = kept[layer], kept[layer + 1]
            alone_T = _relative(again(input_TD.to(before_TD.dtype)), expected_TD, input_TD)
            accumulated_T = _relative(after_TD, expected_TD)
            layers.append(
                {
                    "layer": layer,
                    "median": alone_T.median().item(),
                    "largest": alone_T.max().item(),
                    "above": (~(alone_T <= outlier)).double().mean().item(),  # counts NaN
                    "accumulated": accumulated_T.median().item(),
                }
            )
            progress.add(1)

        reference_TV = reference.walk(texts, keep)
        candidate_TV = candidate.walk(texts, compare)
    return LayerComparison(layers, reference_TV, candidate_TV)


SMALL_UPDATE = 1 / 8
"""A layer that adds less than this part of its output is judged as if it added that much: below, the difference that
remains is only how the sum with the input was rounded."""


def _relative(actual_TD: Tensor, expected_TD: Tensor, input_TD: Tensor | None = None) -> Tensor:
    """(T,): norm(difference) / norm(expected), or of what was added to the input."""
    actual_TD, expected_TD = actual_TD.double(), expected_TD.double()
    size_T = expected_TD.norm(dim=-1)
    if input_TD is not None:
        size_T = torch.maximum((expected_TD - input_TD).norm(dim=-1), SMALL_UPDATE * size_T)
    return (actual_TD - expected_TD).norm(dim=-1) / size_T.clamp_min(1e-30)


class _HiddenStates:
    """Tensors of one shape and dtype in a file that has no name, so nothing is left if the process dies."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __enter__(self) -> _HiddenStates:
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, hidden_TD: Tensor) -> None:
        hidden_TD = hidden_TD.detach().cpu().contiguous()
        self._shape, self._dtype, self._bytes = hidden_TD.shape, hidden_TD.dtype, hidden_TD.nbytes
        data, done = bytes_of(hidden_TD), 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], self._count * self._bytes + done)
        self._count += 1

    def __getitem__(self, number: int) -> Tensor:
        hidden_TD = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(number * self._bytes)
        if not read_into(self._file, bytes_of(hidden_TD)):
            raise CheckpointError(f"{self._folder}: the temporary file of hidden states is too short")
        return hidden_TD
