"""Nothing of this project reads a pickle of a file: a pickle runs what it names, and files travel."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hunyuan_pretrain", "data_tools", "launch", "examples")

READERS = {"load", "loads", "Unpickler"}
"""Of Python's pickle. Writing one runs nothing."""
RUNS_WHAT_IT_READS = {
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}
"""Modules whose readers run what a file says."""
MAY_READ = {"hunyuan_pretrain/checkpoint/inert_pickle.py"}
"""Replaces what such a reader would run."""

NEEDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
"""Function -> the argument without which it may unpickle anything, whatever the environment says."""
NEVER = {
    "dist_checkpointing.load": "unpickles the index and objects; parallel_read.py does not",
    "dist_checkpointing.load_common_state_dict": "unpickles; parallel_read.py does not",
    "load_state_dict_from_url": "unpickles",
    "yaml.load": "use yaml_tree, or yaml.safe_load",
    "yaml.unsafe_load": "use yaml_tree, or yaml.safe_load",
    "yaml.full_load": "use yaml_tree, or yaml.safe_load",
    "checkpoint.load": "of torch.distributed: unpickles",
}
FILES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def test_a_pickle_may_be_written() -> None:
    assert list(faults("import pickle\npickle.dumps(1)", "hunyuan_pretrain/x.py")) == []


def faults(text: str, path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in RUNS_WHAT_IT_READS:
                    yield f"line {node.lineno}: imports {name}"
                if name == "pickle" and isinstance(node, ast.ImportFrom):
                    yield f"line {node.lineno}: imports from pickle, which hides what is read"
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node) in {f"pickle.{one}" for one in READERS} and path not in MAY_READ:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            for name, (argument, value) in NEEDS.items():
                if called.split(".")[-2:] == name.split(".") and given.get(argument) != str(value):
                    yield f"line {node.lineno}: {called} without {argument}={value}"
            for name, why in NEVER.items():
                if called == name or called.endswith(f".{name}"):
                    yield f"line {node.lineno}: {called}: {why}"
            is_model = called.endswith("Model.from_pretrained") or called == "loader.from_pretrained"
            if is_model and given.get("use_safetensors") != "True":
                yield f"line {node.lineno}: {called} without use_safetensors=True"


@pytest.mark.parametrize("path", FILES)
def test_no_file_of_the_product_reads_a_pickle(path: str) -> None:
    assert list(faults((ROOT / path).read_text(encoding="utf-8"), path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "pickle.load(file)",
        "read = pickle.loads",
        "from pickle import load",
        "from dill import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "numpy = np.load(file)",
        "dist_checkpointing.load(state, folder)",
        "yaml.load(text, Loader)",
        "loader.from_pretrained(folder)",
    ],
)
def test_it_would_be_found(text: str) -> None:
    assert len(list(faults(text, "hunyuan_pretrain/x.py"))) == 1
