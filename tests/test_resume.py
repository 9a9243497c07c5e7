"""A run that is interrupted at any moment ends with the same bytes as one that is not.

    python tests/test_resume.py --all OUT

kills eleven papermilled runs, ten at random moments and one while it writes a checkpoint, lets each go on, and merges
into OUT/training.json how many of them ended identical to the byte.
"""
import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__": os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")   # tests have it from conftest

import pytest

from hmx_feel import drift, grpo, runs
from hmx_feel.grpo import check_run, checkpoints, train
from hmx_feel.runs import MARKER, Run, TrainConfig, UserError, content_hash, marker_of, run_path, write_json
from measured import merge

nbs = Path(__file__).resolve().parents[1] / "nbs"
bin_dir = Path(sys.executable).parent
FAST = dict(steps=5, completions_per_step=8, group_size=4, max_completion=24, probe_every=2, save_every=2)
WHOLE = dict(steps=8, completions_per_step=16, max_completion=48, probe_every=8, save_every=2)


def pieces(run):
    "Everything that has to be equal, by name"
    files = [run / "metrics.jsonl", run / "drift.jsonl", run / "adapter" / "adapter_model.safetensors",
             *sorted((run / "completions").iterdir()), *sorted((run / "drift").iterdir())]
    return {p.relative_to(run.path).as_posix(): p.read_bytes() for p in files}


def differences(run, reference):
    "Names of files that are missing, too many or different"
    a, b = pieces(run), pieces(reference)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


# --- in one process ------------------------------------------------------------------------------------------

class Killed(BaseException): "Stands for the end of the process"


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    "Trains with a ledger that looks at four prompts only"
    load = drift.load_prompts
    def run(config):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(drift, "load_prompts", lambda *a, **kw: load(*a, **kw)[:4])
            return train(config)
    return run


@pytest.fixture(scope="module")
def whole(fast, tmp_path_factory):
    "Runs without interruption, by judge"
    made = {}
    def run(judge="base"):
        if judge not in made: made[judge] = fast(TrainConfig(judge=judge, runs=str(tmp_path_factory.mktemp("whole")), **FAST))
        return made[judge]
    return run


@contextmanager
def at(event, step, act, after=True):
    "Inside the block something happens at an event of a step, before or after the callback has done its work"
    make = grpo.make_callback
    def made(*args, **kw):
        watch = make(*args, **kw)
        inner = getattr(watch, event)
        def both(args, state, control, **kw):
            if after: inner(args, state, control, **kw)
            if state.global_step == step: act()
            if not after: inner(args, state, control, **kw)
        setattr(watch, event, both)
        return watch
    grpo.make_callback = made
    try: yield
    finally: grpo.make_callback = make


def die(): raise Killed


def dying(event, step, after=True): return at(event, step, die, after)


def kill(fast, config, *moment):
    "Train until a moment; returns the unfinished run"
    with dying(*moment), pytest.raises(Killed): fast(config)
    return unfinished(config)


def unfinished(config): return grpo.open_run(check_run(config))


MOMENTS = dict(
    base=[("on_step_end", 1), ("on_save", 2, False), ("on_save", 2), ("on_log", 3), ("on_save", 4, False), ("on_step_begin", 4), ("on_save", 5)],
    live=[("on_log", 2), ("on_save", 2), ("on_log", 5)],
    ema=[("on_save", 2), ("on_step_end", 4), ("on_step_begin", 4)])
GOES_ON = dict(base=[2, 2, 2, 4, 5], live=[2, 4], ema=[2, 2, 4])


@pytest.mark.parametrize("judge", MOMENTS)
def test_interrupted_and_whole_runs_are_equal(judge, fast, whole, tmp_path):
    "Killed again and again: at a step, before and after a row is written, before, in and after a save, after the last step"
    config = TrainConfig(judge=judge, runs=str(tmp_path), **FAST)
    for moment in MOMENTS[judge]: kill(fast, config, *moment)
    run = fast(config)
    assert differences(run, whole(judge)) == []
    assert [row["step"] for row in run.read_jsonl("resumes.jsonl")] == GOES_ON[judge]
    assert list(checkpoints(run)) == [2, 4, 5] == list(checkpoints(whole(judge)))
    assert [row["step"] for row in run.read_jsonl("timings.jsonl")] == [1, 2, 3, 4, 5]
    assert not list(run.path.rglob(".*.tmp"))


def test_several_passes_over_the_prompts(fast, tmp_path):
    "Prompts come in the same order after an interruption in the second or third pass"
    prompts = tmp_path / "prompts.jsonl"
    lines = [line for line in (Path(runs.__file__).parent / "prompts" / "hmx-feel.jsonl").read_text().splitlines() if '"train"' in line]
    prompts.write_text("\n".join(lines[:5]) + "\n")
    config = dict(FAST, prompts=str(prompts), max_completion=8, probe_every=9)
    reference = fast(TrainConfig(runs=str(tmp_path / "whole"), **config))
    torn = TrainConfig(runs=str(tmp_path / "torn"), **config)
    kill(fast, torn, "on_step_begin", 4)
    assert differences(fast(torn), reference) == []


def test_old_checkpoints_keep_their_dose(fast, tmp_path):
    "On the grid and where a dose was asked for"
    config = TrainConfig(judge="ema", runs=str(tmp_path), **dict(FAST, save_every=2, dose_steps="1", max_completion=8, probe_every=9))
    kill(fast, config, "on_step_begin", 3)
    run = fast(config)
    held = {s: {p.name for p in f.iterdir()} for s, f in checkpoints(run).items()}
    dose = {"adapter_config.json", "adapter_model.safetensors", "ema.safetensors", MARKER}
    assert [s for s in held if held[s] == dose] == [1, 2] and list(held) == [1, 2, 4, 5]
    assert all({"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < held[s] for s in (4, 5))
    assert [marker_of(f)["resumable"] for f in checkpoints(run).values()] == [False, False, True, True]
    assert not list(run.path.rglob("training_args.bin"))


@pytest.fixture(scope="module")
def killed_once(fast, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    kill(fast, TrainConfig(runs=str(root), **FAST), "on_step_begin", 4)
    return root


@pytest.fixture
def at_four(killed_once, tmp_path):
    "A copy of a run that was killed after its checkpoint of step 4, and its config"
    config = TrainConfig(runs=str(shutil.copytree(killed_once, tmp_path / "runs")), **FAST)
    return unfinished(config), config


@pytest.mark.parametrize("damage", ["no marker", "a file is shorter", "a file is gone", "a byte is different"])
def test_a_torn_checkpoint_does_not_count(at_four, damage, caplog):
    "It is removed, and the run goes on from the one before"
    run, config = at_four
    folder = checkpoints(run)[4]
    if damage == "no marker": (folder / MARKER).unlink()
    elif damage == "a file is gone": (folder / "scheduler.pt").unlink()
    else:
        data = bytearray((folder / "optimizer.pt").read_bytes())
        data[1000] ^= 255
        (folder / "optimizer.pt").write_bytes(data[:-100] if "shorter" in damage else data)
    assert grpo.last_checkpoint(run, FAST["probe_every"]) == 2
    assert list(checkpoints(run)) == [2] and "checkpoint-4: not complete, removed" in caplog.text


def test_lost_rows_lead_to_an_earlier_checkpoint(at_four):
    run, config = at_four
    (run / "completions" / "000003.parquet").unlink()
    assert grpo.last_checkpoint(run, FAST["probe_every"]) == 2


def test_a_checkpoint_of_another_run_is_refused(fast, at_four):
    "In one line that names both and what differs, and nothing is touched"
    run, config = at_four
    marker = marker_of(checkpoints(run)[2])
    write_json(checkpoints(run)[2] / MARKER, {**marker, "run": "tiny/reverse/seed0-0123abcd", "identity": {**marker["identity"], "arm": "reverse", "rubric": "0123abcd" * 8}})
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught: fast(config)
    line = str(caught.value)
    assert "written by run tiny/reverse/seed0-0123abcd, this is run tiny/forward/" in line and f"they differ in arm: 'reverse' there, 'forward' here, rubric: '0123abcd0123...' there, '{run.identity['rubric'][:12]}...' here; take" in line
    assert "\n" not in line and (run / "metrics.jsonl").read_bytes() == before and list(checkpoints(run)) == [2, 4]


def test_replace_begins_anew(fast, at_four):
    run, config = at_four
    (run / "completions" / "000099.parquet").write_bytes(b"")
    run = fast(config.model_copy(update=dict(replace=True)))
    assert not (run / "resumes.jsonl").exists() and len(list((run / "completions").iterdir())) == 5


def test_other_versions_are_noted(fast, at_four, caplog):
    run, config = at_four
    env = run.read_json("env.json")
    run.write_json("env.json", {**env, "packages": {**env["packages"], "torch": "0.1"}})
    kill(fast, config, "on_step_begin", 4)
    (row,) = run.read_jsonl("resumes.jsonl")
    assert row["changed"]["torch"] == ["0.1", env["packages"]["torch"]] and "torch 0.1 -> " in caplog.text


def full(*a, **kw): raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_in_one_line(fast, tmp_path, monkeypatch):
    "Whatever could not be written: nothing of the checkpoint is left, the one before is whole, and the run goes on from there when there is room"
    import torch
    from hmx_feel.policy import Average
    from peft import PeftModel
    config = TrainConfig(judge="ema", runs=str(tmp_path), **dict(FAST, steps=4, max_completion=8, probe_every=9))
    kill(fast, config, "on_step_begin", 2)
    for holder, name in ((PeftModel, "save_pretrained"), (torch, "save"), (Average, "save"), (grpo, "seal")):
        with monkeypatch.context() as m, pytest.raises(UserError) as caught:
            m.setattr(holder, name, full)
            fast(config)
        assert str(caught.value).endswith(": the checkpoint of step 4 cannot be written (No space left on device); the checkpoint of step 2 is kept")
        run = unfinished(config)
        assert list(checkpoints(run)) == [2] and runs.sealed(checkpoints(run)[2])
    assert fast(config).finished


def test_rows_that_do_not_fit_are_one_line(tmp_path, monkeypatch):
    "Metrics on a full disk: a UserError, no half row stays"
    path = runs.append_jsonl(tmp_path / "m.jsonl", dict(step=1))
    monkeypatch.setattr(runs, "_stump", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device."): runs.append_jsonl(path, dict(step=2))
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'


def test_gradients_that_are_no_numbers_keep_the_last_good_checkpoint(fast, tmp_path, monkeypatch):
    "At a step on the grid and under the ledger: nothing is asked of weights that are lost, nothing is saved; the same command comes to the same end"
    from trl import GRPOTrainer
    step = GRPOTrainer.training_step
    def broken(self, model, *args, **kw):
        loss = step(self, model, *args, **kw)
        if self.state.global_step == 3:
            for p in model.parameters():
                if p.grad is not None: p.grad.fill_(float("nan"))
        return loss
    monkeypatch.setattr(GRPOTrainer, "training_step", broken)
    config = TrainConfig(runs=str(tmp_path), **dict(FAST, max_completion=8))
    for _ in range(2):
        with pytest.raises(UserError, match="loss or gradient is not a number at step 4; the checkpoint of step 2 is kept"): fast(config)
        run = unfinished(config)
        assert list(checkpoints(run)) == [2] and runs.sealed(checkpoints(run)[2]) and len(run.metrics()) == 4 and not (run / "drift" / "000004.parquet").exists()


def test_the_stop_rule_remembers_what_was_before(fast, tmp_path):
    "Twenty bad steps end a run wherever it was interrupted"
    config = TrainConfig(runs=str(tmp_path), **dict(FAST, steps=25, max_completion=4, min_mass=1., probe_every=25, save_every=7))
    kill(fast, config, "on_step_begin", 16)
    with pytest.raises(UserError, match="were missing over 20 steps, up to step 20 .max_missing.; the checkpoint of step 14 is kept"): fast(config)
    assert len(unfinished(config).metrics()) == 20


def test_a_signal_lets_the_step_end(fast, whole, tmp_path):
    "Off the grid a checkpoint is written; later it goes, and the bytes are the same"
    config, before = TrainConfig(runs=str(tmp_path), **FAST), [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    for number, step, kept in ((signal.SIGTERM, 3, [2, 3]), (signal.SIGINT, 4, [2, 4])):
        with at("on_step_begin", step - 1, lambda: signal.raise_signal(number)), pytest.raises(UserError) as caught: fast(config)   # noqa: B023
        assert str(caught.value).endswith(f": stopped at step {step} by {number.name}; the same command goes on from there")
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
        run = unfinished(config)
        assert list(checkpoints(run)) == kept and runs.sealed(checkpoints(run)[step])
    run = fast(config)
    assert [row["step"] for row in run.read_jsonl("resumes.jsonl")] == [3, 4] and list(checkpoints(run)) == [2, 4, 5]
    assert differences(run, whole()) == []


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), runs.noting_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == ["SIGINT"]
        signal.raise_signal(signal.SIGINT)


# --- the lock ------------------------------------------------------------------------------------------------

HOLD = """
import os, subprocess, sys, time
child = "import os,sys,time; from pathlib import Path; from hmx_feel.runs import Run; run = Run(Path(sys.argv[1]))\\nwith run.lock(): print('held', flush=True); time.sleep(float(sys.argv[2]))"
os.environ['JPY_PARENT_PID'] = str(os.getpid())
subprocess.Popen([sys.executable, '-c', child, *sys.argv[1:]]); time.sleep(600)
"""


@contextmanager
def held(run, seconds):
    "A launcher with a child that holds the run for some seconds, as Jupyter has a kernel; yields both pids"
    launcher = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "held\n"
    kernel = json.loads((run / ".lock").read_text())["pid"]
    try: yield launcher, kernel
    finally:
        launcher.kill()
        launcher.wait()
        try: os.kill(kernel, signal.SIGKILL)
        except ProcessLookupError: pass


def test_a_run_at_work_is_refused_at_once(tmp_path):
    run = Run.create(tmp_path, "tiny", "forward", 0, {})
    with held(run, 60) as (_, kernel):
        start = time.monotonic()
        with pytest.raises(UserError, match=f"is being run by process {kernel}, for [0-9]+ s now; wait for it, or stop it"):
            with run.lock(): pass
        assert time.monotonic() - start < 1


def test_a_dying_run_is_waited_for(tmp_path, caplog):
    "Its launcher is gone; it lives two seconds longer"
    run = Run.create(tmp_path, "tiny", "forward", 0, {})
    with held(run, 2) as (launcher, kernel):
        launcher.kill()
        launcher.wait()
        with run.lock(): assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
    assert f"waiting for process {kernel}, which is ending" in caplog.text


def test_patience_has_an_end(tmp_path):
    run = Run.create(tmp_path, "tiny", "forward", 0, {})
    with held(run, 60) as (launcher, kernel):
        launcher.kill()
        launcher.wait()
        with pytest.raises(UserError, match=f"is being run by process {kernel}"):
            with run.lock(wait=.5): pass


def test_a_run_that_finished_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    "Another process came to its end between the look and the lock"
    config = TrainConfig(runs=str(tmp_path), **FAST)
    opened = grpo.open_run
    monkeypatch.setattr(grpo, "open_run", lambda checked: opened(checked).finish({}))
    with pytest.raises(UserError, match="is finished; pass replace=True"): train(config)


# --- as a user runs it ---------------------------------------------------------------------------------------

def folder_of(root, **params):
    "The folder of the run that a command with these parameters works in"
    config = TrainConfig(runs=str(root), **params)
    checked = check_run(config)
    identity = dict(checked["identity"], model=config.model, arm=checked["arm"].name, seed=config.seed, schema=runs.SCHEMA, package=runs.hmx_feel.__version__)
    return Run(run_path(config.root, config.model, checked["arm"].name, config.seed, content_hash(identity)[:8]))


def started(*command):
    "A command in nbs/, as in a terminal of its own"
    return subprocess.Popen(list(map(str, command)), cwd=nbs, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def mill(root, **params):
    given = [part for k, v in dict(params, runs=root).items() for part in ("-p", k, v)]
    Path(root).mkdir(exist_ok=True)
    return started(bin_dir / "papermill", "03_train.ipynb", Path(root) / "out.ipynb", *given)


def until(condition, process, seconds=180):
    "Wait for something while a process runs"
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(.002)


def kill_both(process, run):
    "kill -9 of papermill and of its kernel"
    lock = run / ".lock"
    kernel = json.loads(lock.read_text() or "{}").get("pid") if lock.is_file() else None
    process.kill()
    try: os.kill(kernel or process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.communicate()


def done(process):
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out[-3000:]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "The run without interruption"
    return train(TrainConfig(runs=str(tmp_path_factory.mktemp("whole")), **WHOLE))


def test_kill_9_of_a_papermilled_run(reference, tmp_path):
    "At a random moment after the first checkpoint, with its kernel; the same command then goes on"
    run, process = folder_of(tmp_path, **WHOLE), mill(tmp_path, **WHOLE)
    until(lambda: (run / "checkpoints" / "checkpoint-2" / MARKER).is_file(), process)
    time.sleep(random.uniform(0, 2))
    kill_both(process, run)
    assert not run.finished
    done(mill(tmp_path, **WHOLE))
    assert differences(run, reference) == []
    (resumed,) = run.read_jsonl("resumes.jsonl")
    assert f"went on after step {resumed['step']}." in (tmp_path / "out.ipynb").read_text()


def test_sigterm_under_the_command(reference, tmp_path):
    "hmx-feel train finishes its step, saves, and ends with one line; what is left goes on to the same bytes"
    given = [part for k, v in dict(WHOLE, runs=tmp_path).items() for part in ("--" + k.replace("_", "-"), v)]
    run, process = folder_of(tmp_path, **WHOLE), started(bin_dir / "hmx-feel", "train", *given)
    until(lambda: len(run.read_jsonl("metrics.jsonl")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    last = re.fullmatch(r"hmx-feel: .*: stopped at step (\d) by SIGTERM; the same command goes on from there", out.splitlines()[-1])
    assert process.returncode not in (0, -signal.SIGTERM) and last and "Traceback" not in out, out[-3000:]
    assert runs.sealed(checkpoints(run)[int(last[1])]) and len(run.metrics()) == int(last[1])
    assert differences(train(TrainConfig(runs=str(tmp_path), **WHOLE)), reference) == []


# --- python tests/test_resume.py --all -----------------------------------------------------------------------

LONG = dict(steps=12, completions_per_step=16, max_completion=48, probe_every=6, save_every=2)


def half_written(run):
    "Whether a checkpoint is being written now"
    return any(not (f / MARKER).is_file() for f in checkpoints(run).values())


def once(reference, judge, root, moment=None):
    "Kill a run at a moment (s), or in the middle of a save; let it go on; say what is different"
    params = dict(LONG, judge=judge)
    run, process = folder_of(root, **params), mill(root, **params)
    if moment is None: until(lambda: half_written(run), process)
    else:
        try: process.wait(moment)
        except subprocess.TimeoutExpired: pass
    kill_both(process, run)
    was = "finished" if run.finished else f"{len(run.read_jsonl('metrics.jsonl'))} steps, {'torn' if half_written(run) else 'whole'} checkpoints {list(checkpoints(run))}"
    if moment is None and not half_written(run): return once(reference, judge, tempfile.mkdtemp(dir=root))   # the save had just ended
    if not run.finished: done(mill(root, **params))
    return was, [r["step"] for r in run.read_jsonl("resumes.jsonl")], differences(run, reference)


def all_moments(out, seed):
    "Ten random moments and one save; how many came to the same bytes"
    draw, same, references, took = random.Random(seed), 0, {}, {}
    with tempfile.TemporaryDirectory() as top:
        for n, judge in enumerate(("base", "live", "ema") * 3 + ("base", "ema")):
            if judge not in references:
                start = time.monotonic()
                done(mill(f"{top}/{judge}", **LONG, judge=judge))
                references[judge], took[judge] = folder_of(f"{top}/{judge}", **LONG, judge=judge), time.monotonic() - start
            moment = draw.uniform(0, took[judge]) if n < 10 else None
            was, resumed, different = once(references[judge], judge, tempfile.mkdtemp(dir=top), moment)
            same += not different
            print(f"{n + 1:2d} {judge:4s} killed {'in a save' if moment is None else f'after {moment:.0f} s'} ({was}), went on after {resumed or 'nothing'}: {different or 'identical'}", flush=True)
    result = dict(resume_identical=float(same))
    merge(out, "training", result, kills=n + 1, seed=seed)
    return result


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--all", metavar="OUT", required=True, help="folder in which training.json is")
    ask.add_argument("--seed", type=int, default=0, help="of the moments")
    given = ask.parse_args()
    print(all_moments(given.all, given.seed))
