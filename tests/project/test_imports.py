"""Who may import whom, by room and by file. Walks the syntax tree of every file, so imports inside functions count
too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("hunyuan_pretrain", "data_tools", "launch", "tests")

MAY_IMPORT = {
    "config": set(),
    "plan": {"config"},
    "jobs": {"config"},
    "runtime": {"config"},
    "parallel": {"config", "runtime"},
    "model": {"config", "runtime", "parallel"},
    "data": {"config", "runtime", "parallel"},
    "checkpoint": {"config", "plan", "runtime", "parallel", "model", "data"},
    "serving": {"config", "checkpoint", "data"},
    "train": {"config", "plan", "runtime", "parallel", "model", "data", "checkpoint"},
    "evaluation": {"config", "runtime", "parallel", "model", "data", "checkpoint", "train"},
    "report": {"config", "plan", "runtime", "data", "checkpoint"},
    "diagnostics": {"config", "plan", "runtime", "parallel", "model", "data", "checkpoint", "train"},
    "cli": {
        "config",
        "plan",
        "jobs",
        "runtime",
        "parallel",
        "model",
        "data",
        "checkpoint",
        "train",
        "diagnostics",
        "evaluation",
        "report",
        "serving",
    },
    "__main__": {"cli"},
}
"""Room of hunyuan_pretrain -> other rooms that it may import."""

ONLY_IN = {
    "megatron.core.parallel_state": ["hunyuan_pretrain/parallel/groups.py"],
    "megatron.core": [
        "hunyuan_pretrain/runtime/cpu_megatron.py",
        "hunyuan_pretrain/parallel/",
        "hunyuan_pretrain/model/",
        "hunyuan_pretrain/checkpoint/",
        "hunyuan_pretrain/train/",
        "hunyuan_pretrain/evaluation/layout_scorer.py",
        "hunyuan_pretrain/diagnostics/",
    ],
    "megatron.training": [],
    "transformer_engine": [
        "hunyuan_pretrain/runtime/device.py",
        "hunyuan_pretrain/model/engine/",
    ],
    "flash_attn": ["hunyuan_pretrain/model/varlen_attention.py"],
    "flash_attn_interface": ["hunyuan_pretrain/model/varlen_attention.py"],
    "flash_attn_3": ["hunyuan_pretrain/model/varlen_attention.py"],
    "triton": ["hunyuan_pretrain/model/kernels/"],
    "vllm": ["hunyuan_pretrain/serving/"],
    "wandb": ["hunyuan_pretrain/runtime/logging.py"],
    "mlflow": ["hunyuan_pretrain/runtime/logging.py"],
    "lm_eval": ["hunyuan_pretrain/evaluation/"],
    "transformers": [
        "hunyuan_pretrain/checkpoint/configuration_hunyuan.py",
        "hunyuan_pretrain/checkpoint/modeling_hunyuan.py",
        "hunyuan_pretrain/checkpoint/tokenization_hy.py",
        "hunyuan_pretrain/checkpoint/generate.py",
        "hunyuan_pretrain/serving/",
    ],
    "torch": [
        f"hunyuan_pretrain/{room}/"
        for room in (
            "runtime",
            "parallel",
            "model",
            "data",
            "checkpoint",
            "serving",
            "train",
            "evaluation",
            "diagnostics",
        )
    ]
    + ["data_tools/", "launch/node.py", "launch/ranks.py"],
}
"""Module -> files and folders that may import it; a submodule is not covered by its parent's line."""


def source_files() -> list[Path]:
    return sorted(path for name in ("hunyuan_pretrain", "data_tools", "launch") for path in (ROOT / name).rglob("*.py"))


def imports_of(text: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            package = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*package, *(node.module.split(".") if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def module_of(path: Path) -> str:
    """Dotted name of a project file; for an __init__.py, the name of its package."""
    relative = path.relative_to(ROOT)
    return ".".join((relative.parent if path.name == "__init__.py" else relative.with_suffix("")).parts)


def when_run(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of `if TYPE_CHECKING`, which no interpreter imports."""

    class Without(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
            return node.orelse if name == "TYPE_CHECKING" else node

    return Without().visit(tree)


def imported_files(texts: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Module -> modules of the project that it imports. `a.b.c` also imports a.b, which Python runs first, unless the
    file is in that package itself."""
    found: dict[str, set[str]] = {}
    for module, text in texts.items():
        tree = ast.unparse(when_run(ast.parse(text)))
        found[module] = set()
        for _, name in imports_of(tree, module, module in packages):
            parts = name.split(".")
            known = [other for other in accumulate(parts, "{}.{}".format) if other in texts]
            found[module] |= {other for other in known if other == known[-1] or not is_under(module, other)}
        found[module].discard(module)
    return found


def circle_of(imports: dict[str, set[str]]) -> list[str] | None:
    """A cycle of modules, each importing the next and the last the first; None if there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        for other in sorted(imports[module]):
            if circle := walk(other, [*way, module]):
                return circle
        done.add(module)
        return None

    return next((circle for module in sorted(imports) if (circle := walk(module, []))), None)


def is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violation(path: str, name: str) -> str | None:
    """Why a file may not import a module; None if it may."""
    for module, places in ONLY_IN.items():
        covered_elsewhere = any(
            is_under(other, module) and other != module and is_under(name, other) for other in ONLY_IN
        )
        if is_under(name, module) and not covered_elsewhere and not any(path.startswith(place) for place in places):
            return f"{module} only in {', '.join(places) or 'no file'}"
    top, *rest = name.split(".")
    if top not in OURS:
        return None
    mine = path.split("/")[0]
    room = rest[0] if rest else ""
    if mine == "launch":
        # data: the demo's report reads the held-out and the training tokens through the project's own readers.
        allowed = top == "launch" or (top == "hunyuan_pretrain" and room in ("config", "data"))
        return None if allowed else "launch imports config and data only"
    if mine == "data_tools":
        allowed = top == "data_tools" or (top == "hunyuan_pretrain" and room in ("config", "data", "plan"))
        return None if allowed else "data_tools imports config, data and plan only"
    if top != "hunyuan_pretrain":
        return f"nothing imports {top}"
    my_room = path.split("/")[1].removesuffix(".py")
    if my_room == "__init__" or room in ("__version__", ""):
        return None
    if room != my_room and room not in MAY_IMPORT[my_room]:
        return f"{my_room} may import {', '.join(sorted(MAY_IMPORT[my_room])) or 'no other room'}, not {room}"
    return None


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    found = []
    for line, name in imports_of(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py"):
        reason = violation(relative.as_posix(), name)
        if reason:
            found.append(f"{relative}:{line} imports {name}: {reason}")
    assert not found, "\n".join(found)


def test_imports_have_no_cycles() -> None:
    paths = source_files()
    packages = {module_of(path) for path in paths if path.name == "__init__.py"}
    texts = {module_of(path): path.read_text(encoding="utf-8") for path in paths}
    circle = circle_of(imported_files(texts, packages))
    assert circle is None, " -> ".join(circle)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"p.a": "from p import b", "p.b": "def f():\n    from p.a import g"}, ["p.a", "p.b", "p.a"]),
        ({"p.a": "import p.b", "p.b": "from .c import x", "p.c": "from . import a"}, ["p.a", "p.b", "p.c", "p.a"]),
        ({"p": "from p.a import x", "p.a": "from p.b import x", "p.b": "from p import y"}, ["p", "p.a", "p.b", "p"]),
        ({"q": "import p.a", "p": "import q", "p.a": ""}, ["p", "q", "p"]),
        ({"p.a": "from p.b import x", "p.b": "if TYPE_CHECKING:\n    from p.a import X"}, None),
        ({"p.a": "import typing, p.b", "p.b": "if typing.TYPE_CHECKING:\n    import p.a\nelse:\n    import p.c"}, None),
        ({"p.a": "from p.b import x\nfrom p.c import y", "p.b": "from p.c import y", "p.c": "import os"}, None),
        ({"p": "from p.a import x", "p.a": "from p.b import x", "p.b": ""}, None),
    ],
)
def test_the_walk_finds_cycles(texts: dict[str, str], expected: list[str] | None) -> None:
    everything = {"p": "", "p.c": ""} | texts
    assert circle_of(imported_files(everything, {"p"})) == expected


def test_every_room_has_its_line_in_the_table() -> None:
    package = ROOT / "hunyuan_pretrain"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("hunyuan_pretrain/config/x.py", "def f():\n    import torch", "torch only in"),
        (
            "hunyuan_pretrain/config/x.py",
            "from hunyuan_pretrain.plan import counts",
            "config may import no other room, not plan",
        ),
        ("hunyuan_pretrain/plan/x.py", "from ..runtime.device import probe", "plan may import config, not runtime"),
        ("hunyuan_pretrain/model/x.py", "from .. import data", "model may import config, parallel, runtime, not data"),
        (
            "hunyuan_pretrain/model/x.py",
            "from megatron.core import parallel_state",
            "parallel_state only in hunyuan_pretrain/parallel/groups.py",
        ),
        ("hunyuan_pretrain/data/x.py", "import megatron.core.tensor_parallel", "megatron.core only in"),
        ("hunyuan_pretrain/train/x.py", "from megatron.training import get_args", "megatron.training only in no file"),
        ("hunyuan_pretrain/train/x.py", "import importlib\nimportlib.import_module('wandb')", "wandb only in"),
        ("hunyuan_pretrain/train/x.py", "import data_tools.pack", "nothing imports data_tools"),
        ("hunyuan_pretrain/train/x.py", "from tests.helpers import x", "nothing imports tests"),
        ("data_tools/x.py", "from hunyuan_pretrain.train import loop", "data_tools imports config, data and plan only"),
        ("launch/x.py", "from hunyuan_pretrain.train import loop", "launch imports config and data only"),
        ("launch/x.py", "import data_tools.corpus", "launch imports config and data only"),
        ("launch/demo.py", "import torch", "torch only in"),
        ("hunyuan_pretrain/parallel/groups.py", "from megatron.core import parallel_state", None),
        (
            "hunyuan_pretrain/train/x.py",
            "from megatron.core import dist_checkpointing\nfrom . import loop\nfrom ..config.schema import Experiment",
            None,
        ),
    ],
)
def test_the_walk_finds_what_it_should(path: str, text: str, expected: str | None) -> None:
    module = path.removesuffix(".py").replace("/", ".")
    reasons = [violation(path, name) for _, name in imports_of(text, module, is_package=False)]
    assert [reason for reason in reasons if reason] == (
        [] if expected is None else [r for r in reasons if r and expected in r]
    )
    assert any(reasons) == (expected is not None)


def test_collectives_on_whole_tensors_are_called_only_where_their_inputs_are_checked() -> None:
    """NCCL reads from a pointer and a single element count."""
    calls = ("all_gather_into_tensor(", "reduce_scatter_tensor(", "all_to_all_single(")
    callers = {path.relative_to(ROOT): path.read_text() for path in source_files()}
    unchecked = [
        str(path)
        for path, text in callers.items()
        if any(f"dist.{call}" in text for call in calls) and "handed_over(" not in text
    ]
    assert unchecked == [], "use hunyuan_pretrain/parallel/collectives.py"
