"A run in two processes: advantages of a fixed batch as in one, a run folder that is whole"
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import two_processes

from hmx_feel.grpo import check_run
from hmx_feel.runs import Run, TrainConfig, UserError, find_runs, read_parquet

here = Path(__file__).parent
ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(*command):
    "Two processes by accelerate launch, which are told of two devices and find the CPU"
    args = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    return subprocess.run(list(map(str, [*args, *command])), env=ENV, capture_output=True, text=True, timeout=600, cwd=here.parent)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    "What one process and two make of the same twelve answers"
    out = tmp_path_factory.mktemp("two")
    two_processes.main(out)
    done = launch(here / "two_processes.py", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda arm, n: [json.loads((out / f"{arm}-{n}-{i}.json").read_text()) for i in range(n)]


@pytest.mark.parametrize("arm", ["forward", "placebo"])
def test_advantages_of_two_processes_are_those_of_one(batches, arm):
    "And so are rewards, also where a group is spread over both, and is shuffled"
    (one,), two = batches(arm, 1), batches(arm, 2)
    np.testing.assert_allclose(two[0]["advantages"] + two[1]["advantages"], one["advantages"], atol=1e-4)
    assert len(set(np.round(one["advantages"], 2))) > 4 and abs(sum(one["advantages"])) < 1e-3
    for part in two:
        np.testing.assert_allclose(part["rewards"], one["rewards"], atol=1e-6)
        np.testing.assert_allclose(part["last"]["score"], one["last"]["score"], atol=1e-6)
        assert part["last"].keys() == one["last"].keys()


FIELDS = dict(model="tiny", arm="forward", steps=2, completions_per_step=8, group_size=4, micro_batch=4, max_completion=24, probe_every=2, save_every=1, report_to="")


def trained(root):
    "The run that two processes have trained"
    done = launch("-m", "hmx_feel.cli", "train", *[x for k, v in dict(FIELDS, runs=root).items() for x in (f"--{k.replace('_', '-')}", v)])
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = find_runs(root, "tiny", "forward")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory): return trained(tmp_path_factory.mktemp("trained"))


def test_two_processes_train_into_one_folder(run):
    assert run.identity["processes"] == 2 and list(run.metrics().step) == [1, 2] and len(run.read_jsonl("timings.jsonl")) == 2
    for name in ("adapter/adapter_model.safetensors", "adapter/README.md", "config.json", "env.json", "checkpoints/checkpoint-2/complete.json"): assert (run / name).is_file(), name
    rows = [read_parquet(p) for p in sorted((run / "completions").glob("*.parquet"))]
    assert [len(r) for r in rows] == [8, 8] and all(r.groupby("prompt_id").size().eq(4).all() for r in rows)
    assert [p.stem for p in sorted((run / "drift").glob("*.parquet"))] == ["000000", "000002"] and Run.open(run.path).finished


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr("hmx_feel.grpo.team", lambda: type("Three", (), dict(num_processes=3, process_index=0, is_main_process=True)))
    with pytest.raises(UserError, match="micro_batch .* times the number of processes"): check_run(TrainConfig(completions_per_step=64, micro_batch=8))
