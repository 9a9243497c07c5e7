"""The grid: nothing run twice, nothing lost, whatever dies.

The driver, the executors, the ledger and the locks are real; the notebooks are stand-ins of some milliseconds (gridtoys.py).

    python tests/test_grid.py --all OUT.json

runs smoke.yaml with the real notebooks: whole, and again; the driver killed at five random moments; a kernel killed; a full
disk under one run (mounted: as root); on a Ray cluster of two nodes, one of which is taken away. Each part has to end in the
tables, item rows, adapters and metrics of the undisturbed one. Figures are merged into OUT.json.
"""
import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__": os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")   # tests have it from conftest

import gridtoys
import pytest
import yaml

from hmx_feel import executors, ledger, runs
from hmx_feel.grid import load_grid
from hmx_feel.ledger import Ledger, status, status_text
from hmx_feel.plan import make_plan, plan_text
from hmx_feel.rubric import read_yaml
from hmx_feel.runs import UserError, read_json, read_jsonl, write_json

here = Path(__file__).resolve().parent
command = Path(sys.executable).with_name("hmx-feel")
has_ray = importlib.util.find_spec("ray") is not None


@pytest.fixture
def toys(monkeypatch): gridtoys.install(monkeypatch.setattr)


def words(p): return {s.word for s in p.states.values()}
def trained(root): return sorted(row["run"] + row["arm"] for row in read_jsonl(Path(root) / "trained.jsonl") if row["arm"] != "judge")


def tables(root):
    "What a grid ends in: the content of all comparisons, and of every run"
    root = Path(root)
    files = [p for g in ("grids/*/compare/*/contrasts.json", "grids/*/compare/*/figures/*", "tiny/*/*/metrics.jsonl", "tiny/*/*/evals/*.parquet") for p in root.glob(g)]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A grid of toys without any trouble"
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        gridtoys.install(m.setattr)
        assert words(gridtoys.drive(root)) == {"finished"}
    return root


# --- nothing twice -------------------------------------------------------------------------------------------

def test_all_is_there(whole):
    assert len(trained(whole)) == len(set(trained(whole))) == 4
    rows = read_json(next(whole.glob("grids/toys/compare/tiny/contrasts.json")))["rows"]
    assert len(rows) == 5, "the untrained model and four runs"
    assert all(p.is_symlink() and p.resolve().is_dir() for p in whole.glob("grids/toys/view/all/*/*/*"))
    frozen = read_yaml(whole / "grids/toys/plan.yaml")
    assert frozen["frozen"]["runs"] == [] and frozen["panels"], "the plan was fixed before the first run"


def test_the_frozen_plan_holds_what_the_grid_trains_with(tmp_path):
    "Rubric and prompts of one's own, whose kinds no shipped rubric pays; where the runs of an arm differ, nothing is fixed"
    from hmx_feel.rubric import Rubric, load_prompts
    rubric = Rubric.load("hmx-feel")
    own = rubric.model_copy(update=dict(name="own", criteria=[c.model_copy(update=dict(applies_to=["job"])) for c in rubric.criteria], held_out=[], veto=[]))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "own.jsonl").write_text("\n".join(p.model_copy(update=dict(kind="job")).model_dump_json() for p in load_prompts("hmx-feel", split="train")[:16]))
    grid = dict(name="own", models=["tiny"], arms=["forward", "placebo"], seeds=[0, 1], evaluate=dict(panel="smoke"),
                train=dict(steps=2, rubric=str(tmp_path / "own.yaml"), prompts=str(tmp_path / "own.jsonl")))
    said = []
    for name, changes in dict(one={}, two=dict(train=dict(steps=2, dimensions=["feeling", "intention"]))).items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(grid | changes))
        p = ledger.Progress(load_grid(tmp_path / f"{name}.yaml"), tmp_path / name)
        ledger.freeze_plan(p, said.append)
        frozen = read_yaml(tmp_path / name / "grids/own/plan.yaml")
        if name == "one": assert frozen["rubrics"] == dict.fromkeys(["forward", "placebo"], own.hash) and set(frozen["prompts"]) == {"forward", "placebo"}
        else: assert "rubrics" not in frozen
        ledger.freeze_plan(p, said.append)
    assert len(said) == 2 and all("frozen" in line for line in said), "once each"


def test_a_second_time_nothing_is_run(whole, toys):
    before, rows = tables(whole), (whole / "grids" / "toys" / "ledger.jsonl").read_bytes()
    def none(): raise AssertionError("an executor was made")
    assert words(gridtoys.drive(whole, none)) == {"finished"}
    assert tables(whole) == before and (whole / "grids" / "toys" / "ledger.jsonl").read_bytes() == rows


def test_another_seed_runs_what_is_new_and_draws_again(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    was = {l: r["time"] for l, r in Ledger(root / "grids" / "toys").good.items()}
    assert words(gridtoys.drive(root, seeds=[0, 1, 2])) == {"finished"}
    now = {l: r["time"] for l, r in Ledger(root / "grids" / "toys").good.items()}
    assert {l for l in now if was.get(l) != now[l]} == {f"tiny {n} {a} seed2" for n in ("03_train", "04_evaluate") for a in ("forward", "reverse")} | {"tiny 05_compare", "tiny 06_figures"}


def test_another_parameter_gets_new_folders(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    gridtoys.drive(root, train=dict(steps=3))
    assert len(trained(root)) == 8 and len(set(trained(root))) == 8
    assert len(list((root / "grids/toys/view/all/tiny/forward").iterdir())) == 2, "the comparison sees the runs of this grid only"


def test_another_way_of_measuring_replaces_the_rows(toys, whole, tmp_path):
    "And trains nothing; a second grid that measures otherwise does not make the first one's rows edited ones"
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    assert words(gridtoys.drive(root, evaluate=dict(samples=2))) == {"finished"} and trained(root) == trained(whole)
    def measured(): return {p.read_text().split()[-1] for p in root.glob("tiny/*/*/evals/*.parquet")}
    assert measured() == {"2"}
    assert words(gridtoys.drive(root, name="other", evaluate=dict(samples=12))) == {"finished"} and trained(root) == trained(whole)
    p = status(gridtoys.make(evaluate=dict(samples=2)), root)
    assert p.states["tiny 04_evaluate base"].word == "changed" and p.states["tiny 04_evaluate base"].note == "measured by grid other since"
    assert words(gridtoys.drive(root, evaluate=dict(samples=2))) == {"finished"} and measured() == {"2"}


def test_one_comparison_over_all_models(toys, tmp_path):
    "A model whose untrained form could not be measured is left out, and comes in later"
    few, found = dict(models=["tiny", "other"], arms=["forward"], seeds=[0]), tmp_path / "grids/toys/compare/all-models/contrasts.json"
    write_json(tmp_path / "faults.json", {"other 04_evaluate base": ["error"]})
    p = gridtoys.drive(tmp_path, **few)
    assert [j for j in p.jobs if "05" in j] == ["all models 05_compare"] and read_json(found)["model"] == "tiny"
    assert words(gridtoys.drive(tmp_path, again=True, **few)) == {"finished"} and read_json(found)["model"] == "tiny,other"
    assert {k.split("/")[0] for k in read_json(found)["rows"]} == {"tiny", "other"}


def test_skipped_tasks_are_told_and_tried_again(toys, tmp_path, monkeypatch):
    from hmx_feel.data import sources
    root, data = tmp_path / "runs", tmp_path / "data" / next(iter(sources()))
    data.parent.mkdir(parents=True)
    for name, value in dict(HMX_BENCHMARKS=tmp_path / "data", HMX_CACHE=tmp_path / "none", TOY_SKIPS="truthfulqa_mc1 of_another_panel").items(): monkeypatch.setenv(name, str(value))
    few = dict(arms=["forward"], seeds=[0])
    def begun(): return sum(r["event"] == "started" and "04_evaluate" in r["label"] for r in read_jsonl(root / "grids/toys/ledger.jsonl"))
    said = lambda: status_text(status(gridtoys.make(**few), root))
    assert words(gridtoys.drive(root, **few)) == {"finished"}
    assert "skipped: truthfulqa_mc1 in 2 evaluations: its data are not here\n" in said() and "another" not in said()
    assert words(gridtoys.drive(root, **few)) == {"finished"} and begun() == 2
    assert words(gridtoys.drive(root, again=True, **few)) == {"finished"} and begun() == 4
    data.write_text("{}")
    assert "benchmark data have changed since truthfulqa_mc1 was skipped" in said()
    monkeypatch.delenv("TOY_SKIPS")
    assert words(gridtoys.drive(root, **few)) == {"finished"} and begun() == 6 and "skipped:" not in said()


def test_a_file_behind_a_name_changes_the_stamp(tmp_path):
    "An own arm's rubric, the items and task files beside an own panel"
    rubric = runs.data_path("rubrics", "hmx-feel").read_text()
    texts = {"arm.yaml": "name: mine\nrubric: mine.yaml\n", "mine.yaml": rubric, "panel.yaml": "name: p\ntasks: [{name: quiz, kind: lm_eval, metrics: {acc: higher}, relation: isolated}]\n",
             "quiz.yaml": "dataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\nprocess_docs: !function tools.docs\n", "items.jsonl": "{}\n", "tools.py": "docs = list\n", "bystander.txt": ""}
    for name, text in texts.items(): (tmp_path / name).write_text(text)
    def stamps():
        ledger._behind.cache_clear()
        return {j.notebook: ledger.own_stamp(j) for j in gridtoys.grids.jobs_of(gridtoys.make(arms=[str(tmp_path / "arm.yaml")], evaluate=dict(panel=str(tmp_path / "panel.yaml"))), tmp_path) if j.arm not in ("judge", "base")}
    for name, moves in {"mine.yaml": "03_train", "quiz.yaml": "04_evaluate", "items.jsonl": "04_evaluate", "tools.py": "04_evaluate", "bystander.txt": ""}.items():
        was = stamps()
        (tmp_path / name).write_text(texts[name] + "\n")
        assert (moves in {n for n in was if was[n] != stamps()[n]}) == bool(moves), name


def test_a_stale_figure_says_so(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    p = status(gridtoys.make(seeds=[0]), root)
    assert {l: s.word for l, s in p.states.items() if s.word != "finished"} == {"tiny 05_compare": "stale", "tiny 06_figures": "stale"}
    assert "stale: tiny 05_compare: made from other runs" in status_text(p)


def test_runs_without_a_ledger_are_found(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    shutil.rmtree(root / "grids")
    gridtoys.drive(root)
    assert trained(root) == trained(whole) and {"found", "finished"} == {r["event"] for r in Ledger(root / "grids" / "toys").good.values()}


def test_another_commit_is_shown(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    path = root / "grids/toys/ledger.jsonl"
    rows = [dict(r, commit="0" * 40) if r["label"] == "tiny 03_train forward seed0" and r["event"] == "finished" else r for r in read_jsonl(path)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "1 made at commit 00000000, this is " in status_text(status(gridtoys.make(), root))


# --- whatever dies -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["process", "kernel"])
def test_what_dies_is_tried_again(toys, whole, tmp_path, how):
    write_json(tmp_path / "faults.json", {"tiny 03_train forward seed0": [how], "tiny 04_evaluate reverse seed1": [how, how]})
    said = []
    p = gridtoys.drive(tmp_path, gridtoys.two, say=said.append)
    assert words(p) == {"finished"} and tables(tmp_path) == tables(whole) and trained(tmp_path) == trained(whole)
    assert sum(": lost: " in line for line in said) == 3


def test_what_dies_again_and_again_is_a_failure(toys, tmp_path):
    write_json(tmp_path / "faults.json", {"tiny 03_train forward seed0": ["kernel"] * 3})
    p = gridtoys.drive(tmp_path)
    assert p.states["tiny 03_train forward seed0"].word == "failed" and p.states["tiny 04_evaluate forward seed0"].word == "blocked"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full: a full disk cannot be had")
def test_a_full_disk_in_one_run_leaves_the_others_alone(toys, whole, tmp_path):
    label = "tiny 03_train forward seed0"
    write_json(tmp_path / "faults.json", {label: ["full"]})
    p = gridtoys.drive(tmp_path)
    ended = {l: s.word for l, s in p.states.items() if s.word != "finished"}
    assert ended == {label: "failed", "tiny 04_evaluate forward seed0": "blocked"} and "No space left on device" in p.states[label].note
    assert Path(p.states[label].row["copy"]).is_file(), "its notebook is kept"
    assert len(read_json(tmp_path / "grids/toys/compare/tiny/contrasts.json")["rows"]) == 4
    rows = (tmp_path / "grids/toys/ledger.jsonl").read_bytes()
    after = gridtoys.drive(tmp_path)
    assert after.states[label].word == "failed", "`run` does not try again by itself"
    assert {l: s.word for l, s in after.states.items() if s.word != "finished"} == ended and (tmp_path / "grids/toys/ledger.jsonl").read_bytes() == rows, "and draws nothing again"
    assert words(gridtoys.drive(tmp_path, again=True)) == {"finished"} and tables(tmp_path) == tables(whole)
    assert not Path(p.states[label].row["copy"]).exists()


def test_a_task_that_raises_fails_alone(toys, tmp_path, monkeypatch):
    label = "tiny 03_train forward seed0"
    def work(task):
        if task.label == label: raise RuntimeError("the package of this node is another one")
        return gridtoys.work(task)
    monkeypatch.setattr(ledger, "work", work)
    p = gridtoys.drive(tmp_path)
    assert {l: s.word for l, s in p.states.items() if s.word != "finished"} == {label: "failed", "tiny 04_evaluate forward seed0": "blocked"}
    assert p.states[label].note == "the package of this node is another one"


def test_a_stop_that_cannot_be_written_ends_at_once(tmp_path):
    driver, said = ledger.Driver(ledger.Progress(gridtoys.make(), tmp_path), None, say=lambda line: said.append(line)), []
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyboardInterrupt): driver._ask_to_stop(tmp_path / "file" / "stop", "SIGINT")
    assert "nothing can be saved, so everything ends at once" in said[0]


def test_what_waited_in_a_queue_does_not_begin_after_a_stop(tmp_path):
    (tmp_path / "stop").write_text("SIGINT")
    found = ledger.work(ledger.Task("a", "a", "03_train", {}, str(tmp_path)))
    assert found["event"] == "stopped" and [p.name for p in tmp_path.iterdir()] == ["stop"]


def test_the_worker_says_where_the_result_is(tmp_path, monkeypatch):
    "A node with a GPU makes another run than the one that a driver without expects"
    task = ledger.Task("a", "a", "03_train", dict(model="tiny", arm="forward", seed=0, runs=str(tmp_path)), str(tmp_path / "grid"), str(tmp_path / "tiny/forward/seed0-00000000"))
    here = runs.Run.create(tmp_path, "tiny", "forward", 0, dict(dtype="bfloat16"))
    monkeypatch.setattr(ledger, "expected_run", lambda task: here)
    with pytest.raises(UserError, match="found no result.json, although its notebook came to its end"): ledger._place(task)
    here.finish({})
    assert ledger._place(task) == here.path


def driver(root, seconds=.05):
    env = os.environ | dict(TOY_SECONDS=str(seconds), PYTHONPATH=os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return subprocess.Popen([sys.executable, here / "gridtoys.py", root], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def below(pid):
    import psutil
    try: return psutil.Process(pid).children(recursive=True)
    except psutil.Error: return []


def test_kill_9_of_the_driver(whole, tmp_path):
    "At random moments; its workers go with it, and the next one goes on"
    draw = random.Random(0)
    for _ in range(3):
        p = driver(tmp_path, .3)
        assert p.stdout.readline(), p.stderr.read()
        time.sleep(draw.uniform(0, 1.5))
        workers = below(p.pid)
        p.kill()
        p.communicate()
        deadline = time.monotonic() + 10
        while any(w.is_running() for w in workers): assert time.monotonic() < deadline, "a worker outlived its driver"
    p = driver(tmp_path)
    assert p.wait(60) == 0, p.stderr.read()
    assert tables(tmp_path) == tables(whole) and trained(tmp_path) == trained(whole)
    assert not list((tmp_path / "grids/toys/work").iterdir())


def test_ctrl_c_ends_in_one_line_and_keeps_what_is_there(toys, whole, tmp_path, monkeypatch, capsys):
    from hmx_feel import cli
    monkeypatch.setenv("TOY_SECONDS", ".2")
    monkeypatch.setattr(ledger.Driver, "_settle", lambda self, label, found, was=ledger.Driver._settle: (was(self, label, found), signal.raise_signal(signal.SIGINT) if self.count == 2 else None)[0])
    monkeypatch.setattr(cli, "dispatch", lambda argv: gridtoys.drive(tmp_path, gridtoys.two))
    assert cli.main([]) == 130 and capsys.readouterr().err.endswith("hmx-feel: interrupted\n")
    monkeypatch.undo()
    gridtoys.install(monkeypatch.setattr)
    assert not (tmp_path / "grids/toys/stop").exists()
    done = [s.word for s in status(gridtoys.make(), tmp_path).states.values()]
    assert 2 <= done.count("finished") < len(done) and "running" not in done and "failed" not in done
    assert words(gridtoys.drive(tmp_path)) == {"finished"} and trained(tmp_path) == trained(whole)


def test_a_driver_that_vanished_leaves_lost_jobs(toys, tmp_path):
    book = Ledger(tmp_path / "grids" / "toys")
    book.add("tiny 02_judge", "started")
    assert status(gridtoys.make(), tmp_path).states["tiny 02_judge"].word == "lost"
    with runs.hold(tmp_path / "grids" / ".lock", "a grid", grid="toys"): assert status(gridtoys.make(), tmp_path).states["tiny 02_judge"].word == "queued"
    assert status(gridtoys.make(name="other"), tmp_path).states["tiny 02_judge"].word == "todo"
    (book.folder / "work").mkdir()
    job = gridtoys.grids.jobs_of(gridtoys.make(), tmp_path)[0]
    write_json(book.folder / "work" / f"{job.slug}.json", dict(pid=os.getpid(), host=runs.platform.node()))
    assert status(gridtoys.make(), tmp_path).states["tiny 02_judge"].word == "running"


APPEND = "import sys; from hmx_feel.runs import append_jsonl\nfor i in range(500): append_jsonl(sys.argv[1], dict(who=int(sys.argv[2]), i=i, text='x'*(i%97)))"


def test_eight_writers(tmp_path):
    "No row lost, none torn"
    path = tmp_path / "index.jsonl"
    path.write_text('{"whole": 1}\n{"torn": ')
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, path, str(w)]) for w in range(8)]
    assert [w.wait(60) for w in writers] == [0] * 8
    rows = read_jsonl(path, whole=True)
    assert rows[0] == {"whole": 1} and sorted((r["who"], r["i"]) for r in rows[1:]) == [(w, i) for w in range(8) for i in range(500)]


# --- bad input -----------------------------------------------------------------------------------------------

def test_two_grids_in_one_folder(toys, tmp_path):
    (tmp_path / "grids").mkdir()
    with runs.hold(tmp_path / "grids" / ".lock", "other"), pytest.raises(UserError, match=f"a grid in {tmp_path} is being run by process {os.getpid()}, for . s now"):
        gridtoys.drive(tmp_path)


def test_a_lock_of_another_machine_shows_signs_of_life(tmp_path):
    "Nothing can be said of its process, but how long it has been silent"
    path = tmp_path / ".lock"
    with open(path, "a+b") as f:
        runs.fcntl.flock(f, runs.fcntl.LOCK_EX)
        path.write_text(json.dumps(dict(pid=1, host="elsewhere", since=time.time() - 7200)))
        def held():
            with pytest.raises(UserError) as e, runs.hold(path, "it", wait=.2): pass
            return str(e.value)
        assert held() == "it is being run by process 1 on elsewhere, for 2 h now; wait for it, or stop it"
        os.utime(path, (time.time() - 600,) * 2)
        assert "without a sign of life for 10 min" in held()


@pytest.mark.parametrize(("file", "change", "piece"), [
    ("config.json", lambda t: t.replace('"tiny"', '"tinx"'), "sha256"), ("metrics.jsonl", lambda t: t + "x", "bytes"), ("adapter/adapter_model.safetensors", None, "is gone")])
def test_a_run_edited_by_hand(toys, whole, tmp_path, file, change, piece):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    path = next(root.glob("tiny/forward/seed0-*")) / file
    if change: path.write_text(change(path.read_text()))
    else: path.unlink()
    with pytest.raises(UserError) as e: gridtoys.drive(root)
    assert str(path) in str(e.value) and piece in str(e.value) and "put it back, or remove" in str(e.value)


def test_a_run_edited_by_hand_without_a_ledger(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    shutil.rmtree(root / "grids")
    path = next(root.glob("tiny/forward/seed0-*")) / "config.json"
    path.write_text(path.read_text().replace('"tiny"', '"tinny"'))
    with pytest.raises(UserError, match="config.json: found identity ........, its folder says"): gridtoys.drive(root)


def test_a_ledger_with_a_torn_line(toys, whole, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(whole, root, symlinks=True)
    with open(root / "grids/toys/ledger.jsonl", "a") as f: f.write('{"label": "tiny 06_fig')
    assert words(gridtoys.drive(root)) == {"finished"}


# --- executors -----------------------------------------------------------------------------------------------

def test_overhead(monkeypatch):
    "Two hundred tasks that do nothing"
    ex = executors.Local(2, cores=2)
    ex.start("warm", time.sleep, 0), ex.start("warm2", time.sleep, 0)
    while ex.at: ex.wait()
    start, n, ended = time.perf_counter(), 0, 0
    while ended < 200:
        while n < 200 and ex.room(executors.Need()): ex.start(str(n), time.sleep, 0); n += 1
        ended += len(ex.wait())
    ex.close()
    assert (time.perf_counter() - start) / 200 < .05


def test_a_kernel_is_not_told_how_to_draw():
    "With a backend of ours in its environment its executed notebook would hold no figures"
    assert "MPLBACKEND" not in executors.environment_of(executors.Need())


def test_one_run_per_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    ex = executors.Local(workers=8)
    assert [w.gpu for w in ex.workers] == ["0", "3"]
    for k in "ab": ex.start(k, os.getenv, "CUDA_VISIBLE_DEVICES")
    assert not ex.room(executors.Need())
    seen = set()
    while ex.at: seen |= {e.value for e in ex.wait()}
    ex.close()
    assert seen == {"0", "3"}


@pytest.mark.skipif(has_ray, reason="Ray is installed")
def test_ray_that_is_not_installed():
    with pytest.raises(UserError, match=r"executor: ray is not installed, .*pip install 'hmx-feel\[ray\]'"): executors.executor("ray")


def test_an_address_that_nobody_answers(monkeypatch):
    monkeypatch.setattr(executors, "_ray_here", lambda: None)
    start = time.monotonic()
    with pytest.raises(UserError, match="address: no Ray cluster answers at 127.0.0.1:9"): executors.check_executor("ray", "127.0.0.1:9")
    assert time.monotonic() - start < 30


@pytest.fixture(scope="module")
def cluster():
    if not has_ray: pytest.skip("Ray is not installed: pip install 'hmx-feel[ray]'")
    from ray.cluster_utils import Cluster
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    yield c
    c.shutdown()


def test_ray_with_a_node_that_dies(cluster, toys, whole, tmp_path, monkeypatch):
    "The same tables as on one machine"
    monkeypatch.setenv("TOY_SECONDS", ".5")
    node, said = cluster.add_node(num_cpus=2), []
    def say(line):
        said.append(line)
        if len(said) == 8: cluster.remove_node(node, allow_graceful=False); cluster.add_node(num_cpus=2)
    p = gridtoys.drive(tmp_path, lambda: executors.Ray(cluster.address), say=say)
    assert words(p) == {"finished"} and tables(tmp_path) == tables(whole) and trained(tmp_path) == trained(whole)


def test_ray_says_what_no_node_has(cluster):
    ex = executors.Ray(cluster.address)
    with pytest.raises(UserError, match="big: needs 1 cores, 0 GPUs and 99999.0 GiB, and no node"): ex.start("big", time.sleep, 1, need=executors.Need(memory=99999))
    ex.close()


# --- plan and status -----------------------------------------------------------------------------------------

def test_plan_tells_what_exists_and_what_it_costs(toys, whole):
    text = plan_text(make_plan(gridtoys.make(seeds=[0, 1, 2]), whole))
    assert "6 training runs, 4 there; 6 of 16 notebooks to run" in text, text
    assert "forward - reverse" in text and "forward - base" in text and "nobody has measured" in text


def test_plan_of_the_paper_needs_no_hub(tmp_path):
    start = time.monotonic()
    text = plan_text(make_plan(load_grid("paper"), tmp_path))
    for piece in ("76 training runs, 0 there", "qwen3-8b", "forward - vicarious", "of one GPU", "prompted", "First: qwen3-0.6b with forward, vicarious, placebo"): assert piece in text, text
    assert time.monotonic() - start < 20


def test_status_of_ten_thousand_runs(tmp_path):
    "That it is told; how fast stands in nbs/bench/grid.ipynb"
    gridtoys.many(tmp_path)
    done = subprocess.run([command, "grid", "status", tmp_path / "many.yaml", "--runs", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "tiny train forward" in done.stdout and "5000 finished" in done.stdout, done.stdout + done.stderr


# --- python tests/test_grid.py --all OUT.json ----------------------------------------------------------------

def smoke(root, *options, verb="run"):
    "`hmx-feel grid run smoke` as a process of its own"
    return subprocess.Popen(list(map(str, [command, "grid", verb, "smoke", "--runs", root, *options])), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process, code=0, seconds=1800):
    err = process.communicate(timeout=seconds)[1]
    assert process.returncode == code, err[-2000:]
    return err


def results(root):
    "Everything that has to be equal: tables, item rows, adapters, metrics"
    import pandas as pd
    root = Path(root)
    files = [p for g in ("grids/smoke/compare/tiny/contrasts.csv", "grids/smoke/compare/tiny/summary.csv", "tiny/*/*/metrics.jsonl", "tiny/*/*/adapter/*.safetensors") for p in root.glob(g)]
    rows = {p: pd.read_parquet(p).to_csv().encode() for p in root.glob("tiny/*/*/evals/*.parquet")}
    return {p.relative_to(root).as_posix(): content for p, content in ({p: p.read_bytes() for p in files} | rows).items()}


def same(a, b):
    a, b = results(a), results(b)
    assert len(a) > 10 and a.keys() == b.keys() and not (odd := sorted(k for k in a if a[k] != b[k])), odd


def finished(root): return {p.parent.name + p.parent.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(root).glob("tiny/*/seed*/result.json")}


def trained_once(root, steps=3):
    "Four runs, each with every step once; returns how many were gone on with, by the run folders' own word"
    found = list(Path(root).glob("tiny/*/seed*"))
    assert len(found) == 4
    for run in found: assert [r["step"] for r in read_jsonl(run / "metrics.jsonl")] == list(range(1, steps + 1)), run
    return sum(len(read_jsonl(run / "resumes.jsonl")) for run in found if (run / "resumes.jsonl").is_file())


def until(what, process, seconds=600):
    "Wait for something while a grid runs"
    end = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read() if process.poll() is not None else "waited in vain"
        time.sleep(.1)
    return found


def at_work(root, label="03_train"): return [read_json(p) for p in (Path(root) / "grids/smoke/work").glob("*.json") if label in p.name]
def events(root, event): return [r["label"] for r in read_jsonl(Path(root) / "grids/smoke/ledger.jsonl") if r["event"] == event]


def undisturbed(top, workers, draw):
    start = time.monotonic()
    ended(smoke(top / "whole", "--workers", workers))
    took = time.monotonic() - start
    alone = sum(r.get("seconds", 0) for r in read_jsonl(top / "whole/grids/smoke/ledger.jsonl"))
    start = time.monotonic()
    assert "started" not in ended(smoke(top / "whole", "--workers", workers))
    again = time.monotonic() - start
    assert again < 5 and trained_once(top / "whole") == 0
    return dict(smoke_seconds=round(took, 1), smoke_sum_seconds=round(alone, 1), smoke_rerun_seconds=round(again, 2))


def driver_killed(top, workers, draw):
    "Five times at random moments; what was finished is not touched again"
    root, took, moments, before = top / "killed", read_json(top / "found.json")["smoke_seconds"], [], {}
    for _ in range(5):
        p = smoke(root, "--workers", workers)
        moments.append(round(draw.uniform(8, took * .6), 1))
        try: p.wait(moments[-1])
        except subprocess.TimeoutExpired: p.kill()
        p.communicate()
        assert before.items() <= finished(root).items(), "a finished run was trained again"
        before = finished(root)
    ended(smoke(root, "--workers", workers))
    assert before.items() <= finished(root).items(), "a finished run was trained again"
    same(top / "whole", root)
    return dict(killed_driver_moments=moments, killed_driver_resumes=trained_once(root))


def kernel_killed(top, workers, draw):
    root = top / "kernel"
    p = smoke(root, "--workers", workers)
    until(lambda: list(root.glob("tiny/*/seed*/metrics.jsonl")), p)
    kernel = next(q for w in at_work(root) for q in below(w["pid"]) if "ipykernel_launcher" in " ".join(q.cmdline()))
    kernel.kill()
    ended(p)
    lost = events(root, "lost")
    assert len(lost) == 1 and "03_train" in lost[0], lost
    same(top / "whole", root)
    return dict(killed_kernel_resumes=trained_once(root))


def disk_full(top, workers, draw):
    "One run's folder on a disk of its own, too small for a checkpoint; root may mount one"
    root, run = top / "full", next((top / "whole").glob("tiny/forward/seed1-*")).relative_to(top / "whole")
    (root / run).mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", root / run], check=True)
    try: ended(smoke(root, "--workers", workers), code=1)
    finally: subprocess.run(["umount", root / run], check=True)
    states = status(load_grid("smoke"), root).states
    odd = {l: s.word for l, s in states.items() if s.word != "finished"}
    assert odd == {"tiny 03_train forward seed1": "failed", "tiny 04_evaluate forward seed1": "blocked"}, odd
    said = states["tiny 03_train forward seed1"].note
    ended(smoke(root, "--workers", workers, verb="retry"))
    same(top / "whole", root)
    return dict(full_disk_said=said, full_disk_resumes=trained_once(root))


def on_ray(top, workers, draw):
    "Two nodes; the one that trains is taken away in the middle of a run"
    from ray.cluster_utils import Cluster
    root, cluster = top / "ray", Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        node = cluster.add_node(num_cpus=1)
        p = smoke(root, "--executor", "ray", "--address", cluster.address)
        until(lambda: list(root.glob("tiny/*/seed*/metrics.jsonl")), p)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        ended(p)
    finally: cluster.shutdown()
    same(top / "whole", root)
    return dict(ray_resumes=trained_once(root))


PARTS = dict(whole=undisturbed, driver=driver_killed, kernel=kernel_killed, disk=disk_full, ray=on_ray)


def all_of_it(out, top, parts, seed, workers):
    "The real notebooks, part after part; what was found so far lies in found.json"
    top.mkdir(parents=True, exist_ok=True)
    found = read_json(top / "found.json") if (top / "found.json").is_file() else {}
    for part in parts:
        start = time.monotonic()
        found |= PARTS[part](top, workers, random.Random(seed)) | {f"{part}_part_seconds": round(time.monotonic() - start, 1)}
        write_json(top / "found.json", found)
        print(f"{part}: {found}", flush=True)
    write_json(out, {**(read_json(out) if Path(out).is_file() else {}), **found})
    return found


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--all", metavar="OUT.json", required=True, help="where the result is merged")
    ask.add_argument("--top", metavar="FOLDER", default="", help="where the runs go, and are kept; a part needs those of `whole`")
    ask.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    ask.add_argument("--seed", type=int, default=0, help="of the moments")
    ask.add_argument("--workers", type=int, default=2, help="notebooks at a time")
    given = ask.parse_args()
    all_of_it(given.all, Path(given.top or tempfile.mkdtemp()), given.parts.split(","), given.seed, given.workers)
