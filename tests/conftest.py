"""What every test runs under. Set before anything imports torch or a Hugging Face library, and inherited by subprocesses."""
import os
import signal
import threading

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"): os.environ.pop(name, None)  # `make test` started us; the make that a test starts is another
if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` has it ignored


LONG = ("test_notebooks", "test_resume", "test_judges_at_work", "test_grpo", "test_house", "test_bench", "test_cli")


def pytest_collection_modifyitems(items):
    "Files that take long begin first, so that no process ends with one of them alone"
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def runs(tmp_path_factory):
    "A root for runs that this session throws away; the checkout's own runs/ is left alone."
    root = tmp_path_factory.mktemp("runs")
    before = os.environ.get("HMX_RUNS")
    os.environ["HMX_RUNS"] = str(root)
    yield root
    if before is None: del os.environ["HMX_RUNS"]
    else: os.environ["HMX_RUNS"] = before
