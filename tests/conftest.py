"""Shared fixtures: the tiny corpus, made once, and one thread per process."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.helpers.runs import make_corpus

# before torch is loaded: on small tensors threads mostly wait for each other, and the tests run a process on every core
os.environ.setdefault("OMP_NUM_THREADS", "1")
# before triton is loaded: without a GPU its interpreter runs the kernels, on CPU tensors
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()  # before test modules import what needs megatron

# the parent of the tests may ignore these signals (nohup, a background job), and processes under test would inherit it
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


# a machine that does other work exceeds any time limit of an example
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Do not name tests after bytes: a gzip file contains the time, so two workers that collect in different seconds
    would not agree."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no collection of cycles need search it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def groups_left_at_the_end() -> Iterator[None]:
    """Destroy the process groups that tests of one rank leave behind; NCCL complains about them."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def the_job_of_all_tests_stays() -> Iterator[None]:
    """Fail the test that leaves a process group which it found: later tests of this process share it, and they would
    fail instead."""
    was_joined = _is_joined()
    yield
    assert _is_joined() or not was_joined, "this test left the process group that other tests had created"


@pytest.fixture(scope="module", autouse=True)
def the_job_outlives_fixtures() -> Iterator[None]:
    """The same for what the fixtures of a file do."""
    was_joined = _is_joined()
    yield
    assert _is_joined() or not was_joined, "this file left the process group that other tests had created"


def _is_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


@pytest.fixture(scope="module", params=["transformer_engine", "transformer_engine_newest"])
def transformer_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes started under this fixture find this version of Transformer Engine's Python part: the one of the extra
    `dev` of megatron-core 0.16, or the newest that works with the newest megatron-core (.ci/locks)."""
    folder = Path(sys.prefix) / request.param
    if not folder.is_dir():
        pytest.skip(f"needs Transformer Engine's Python part in {folder}: run make (the newest one: with Python 3.12)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMER_ENGINE_FOLDER", str(folder))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tokenizer/, train/ and heldout/ of about 500 short sequences."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")
