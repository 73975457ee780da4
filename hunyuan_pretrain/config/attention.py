"""Attention backends: what each computes, and what it needs.

`BACKENDS` has one entry for each. The configuration rules, the machine check, `doctor` and the choice before the first
step read it; model/attention_backends.py has the function of each. An entry says what is known in advance. Whether a
backend is right and fast on a machine, train/attention_choice.py finds out by running it. This module imports no torch.

Sources: the checks in torch's aten/src/ATen/native/transformers/cuda, in flash-attn's csrc/flash_attn/flash_api.cpp and
hopper/flash_api.cpp, and in Transformer Engine's attention/dot_product_attention/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

BackendName = Literal[
    "cudnn", "flash_attn_3", "flash_attn_2", "torch_varlen", "per_document", "cudnn_batched", "torch_batched"
]
Kind = Literal["packed", "uniform"]
"""Of a micro-batch: documents of any lengths, or all of one length, as where each document fills its sequence."""
KINDS: tuple[Kind, ...] = get_args(Kind)

DETERMINISTIC_SCORES = 1 << 30
"""A bound on documents x heads x longest queries x longest keys of a call. At or above it, Transformer Engine newer
than 2.11 has no deterministic attention for packed documents on Hopper: cuDNN's backward pass takes some 128 bytes for
each. 2.20 rejects such a call; 2.11 did not."""
SCORES_UNBOUNDED_TO = (2, 11)
"""Last version of Transformer Engine without that bound."""


class AttentionChoice(NamedTuple):
    """The backend for each kind of micro-batch."""

    packed: BackendName
    uniform: BackendName

    def __str__(self) -> str:
        if self.packed == self.uniform:
            return self.packed
        return f"{self.packed}, and {self.uniform} where all documents of a micro-batch have the same length"


PER_DOCUMENT = AttentionChoice("per_document", "per_document")
"""The choice that runs everywhere, and the only one on a CPU."""


@dataclass(frozen=True)
class Work:
    """The attention of one run, on one GPU."""

    capability: tuple[int, int] | None
    """Compute capability of the GPU; None: a CPU."""
    packages: Mapping[str, str | None]
    """Distribution -> installed version; None: absent, or not used by the run."""
    dtype: str
    head_dim: int
    is_deterministic: bool
    is_gathered: bool
    """Context parallelism by all_gather: a rank has some queries and all keys."""
    is_recorded: bool
    """runtime.cuda_graphs: each micro-batch is computed as packed, with boundaries that replays read from memory."""
    longest_scores: int
    """Query heads x queries x keys of a rank, for one document that fills the longest sequence."""


@dataclass(frozen=True)
class Backend:
    """One way to compute causal attention with grouped queries within documents. None of them uses a sliding window."""

    name: BackendName
    meaning: str
    """Its text in the description of runtime.attention_backend."""
    kind: Kind = "packed"
    """The micro-batches that it computes; "packed" includes "uniform"."""
    package: str | None = None
    """Distribution that it needs besides torch."""
    version: tuple[int, ...] = ()
    """Lowest version of the package."""
    capability: tuple[int, int] = (8, 0)
    """Lowest compute capability."""
    below: tuple[int, int] | None = None
    """Compute capabilities from this one on do not have the kernel."""
    head_multiple: int = 8
    max_head_dim: int = 256
    deterministic_capability: tuple[int, int] = (0, 0)
    """Lowest compute capability with a deterministic backward pass."""
    deterministic_below: tuple[int, int] | None = None
    deterministic_head_dim: int = 256
    """Largest head width of a deterministic backward pass."""
    reads_memory: bool = False
    """Whether it reads the boundaries of documents from the GPU's memory, so that a replay can have others."""
    has_score_bound: bool = False
    """Whether DETERMINISTIC_SCORES applies."""
    runs_everywhere: bool = False

    def missing(self, work: Work) -> str | None:
        """Why it cannot do this work; None if nothing is known against it."""
        if work.is_recorded and not self.reads_memory:
            return "with runtime.cuda_graphs each replay would have the documents of the step that was recorded"
        return None if self.runs_everywhere else next(self._reasons(work), None)

    def _reasons(self, work: Work) -> Iterator[str]:
        if work.capability is None:
            yield "it runs on CUDA devices only"
            return
        if work.dtype != "bf16":
            yield f"it computes in bf16, not in {work.dtype}"
        if work.head_dim % self.head_multiple or work.head_dim > self.max_head_dim:
            yield f"head widths are multiples of {self.head_multiple} up to {self.max_head_dim}, not {work.head_dim}"
        if self.kind == "uniform" and work.is_gathered:
            yield "it takes as many queries as keys, but with context parallelism by all_gather a rank has more keys"
        if not self.capability <= work.capability or (self.below is not None and work.capability >= self.below):
            last = f", and less than {_dotted(self.below)}" if self.below else ""
            yield f"it needs compute capability {_dotted(self.capability)} or more{last}; {_has(work.capability)}"
        yield from self._package_reasons(work)
        if work.is_deterministic:
            yield from self._nondeterminism(work.capability, work)

    def _package_reasons(self, work: Work) -> Iterator[str]:
        if self.package is None:
            return
        found = work.packages.get(self.package)
        if found is None:
            used = "used" if self.package == "transformer-engine" else "installed"
            yield f"{self.package} is not {used}"
        elif numbers(found) < self.version:
            yield f"it needs {self.package} {_dotted(self.version)} or newer, not {found}"

    def _nondeterminism(self, capability: tuple[int, int], work: Work) -> Iterator[str]:
        below = self.deterministic_below
        if not self.deterministic_capability <= capability or (below is not None and capability >= below):
            yield f"its backward pass is not deterministic on compute capability {_dotted(capability)}"
        if work.head_dim > self.deterministic_head_dim:
            widest = self.deterministic_head_dim
            yield f"its backward pass is deterministic for head widths up to {widest}, not {work.head_dim}"
        version = numbers(work.packages.get("transformer-engine") or "")
        if (
            self.has_score_bound
            and capability == (9, 0)
            and version[:2] > SCORES_UNBOUNDED_TO
            and (work.is_recorded or work.longest_scores >= DETERMINISTIC_SCORES)
        ):
            limit = f"{work.longest_scores:,}, and must be less than {DETERMINISTIC_SCORES:,}"
            if work.is_recorded:
                limit += " for all documents that a micro-batch may have (runtime.cuda_graphs)"
            yield (
                "Transformer Engine has no deterministic backward pass for packed documents as long as the sequences "
                f"here: heads x queries x keys is {limit}"
            )


BACKENDS: dict[BackendName, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cudnn",
            "cuDNN's for packed documents, through Transformer Engine",
            package="transformer-engine",
            reads_memory=True,
            capability=(9, 0),
            below=(12, 0),
            deterministic_capability=(9, 0),
            deterministic_below=(10, 0),
            has_score_bound=True,
        ),
        Backend(
            "flash_attn_3",
            "the package flash-attn-3, on Hopper",
            package="flash-attn-3",
            reads_memory=True,
            version=(3, 0),
            capability=(9, 0),
            below=(10, 0),
            deterministic_head_dim=192,
        ),
        # 2.4.1 brought the deterministic backward pass
        Backend("flash_attn_2", "the package flash-attn", package="flash-attn", version=(2, 4, 1), reads_memory=True),
        Backend("torch_varlen", "torch's FlashAttention-2 for packed documents", reads_memory=True),
        Backend(
            "per_document",
            "torch's flash kernels, one call for each document; runs everywhere",
            runs_everywhere=True,
        ),
        Backend(
            "cudnn_batched",
            "cuDNN's for sequences of one length, through Transformer Engine",
            kind="uniform",
            package="transformer-engine",
            deterministic_capability=(9, 0),
            deterministic_below=(10, 0),
        ),
        Backend("torch_batched", "torch's FlashAttention-2 for sequences of one length", kind="uniform"),
    )
}
"""By preference where two are as fast as each other."""


def candidates(setting: str, kind: Kind) -> tuple[BackendName, ...]:
    """The backends that runtime.attention_backend=`setting` allows for a kind of micro-batch, in order of
    preference."""
    able = [name for name, backend in BACKENDS.items() if backend.kind == "packed" or kind == "uniform"]
    chosen = None if setting == "auto" else BACKENDS[setting]  # type: ignore[index]
    if chosen is None or chosen.kind not in ("packed", kind):
        return tuple(able)
    return (chosen.name,)


def nearest(setting: str, work: Work, without: Iterable[str] = ()) -> str:
    """A hint: auto, or a backend like `setting` that can do the work."""
    wanted = BACKENDS[setting].kind  # type: ignore[index]
    found = next(
        (
            name
            for name, backend in BACKENDS.items()
            if backend.kind == wanted and name not in without and backend.missing(work) is None
        ),
        None,
    )
    return f"use {found}, or auto" if found else "use auto"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 8, 3) for "2.8.3.post1"; () if there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))


def _has(capability: tuple[int, int]) -> str:
    return f"this GPU has {_dotted(capability)}"
