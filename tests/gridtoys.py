"""Stand-ins for the notebooks of a grid: they leave folders like the real ones, in milliseconds, and break when told to.

Everything else is real: the driver, the executors, the ledger, the locks, the links. `python gridtoys.py GRID ROOT` is a driver.
"""
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from hmx_feel import grid as grids
from hmx_feel import ledger
from hmx_feel.executors import Ended, Local
from hmx_feel.runs import Run, UserError, append_jsonl, find_runs, read_json, write_json, write_text

GRID = dict(name="toys", models=["tiny"], arms=["forward", "reverse"], seeds=[0, 1])
real_work = ledger.work


class DeadKernelError(RuntimeError): "As nbclient calls a kernel that died"


def make(**change): return grids.check_names(grids.Grid(**GRID | change), "toys.yaml")


def run_of(job_or_notebook, params):
    "The run of a calibration, a training or the untrained model"
    arm = {"02_judge": "judge", "04_evaluate": "base"}.get(job_or_notebook, params.get("arm"))
    return Run.at(Path(params["runs"]), params["model"], arm, int(params.get("seed") or 0), {k: v for k, v in params.items() if k not in ("runs", "run", "panel")})


def expected_run(job): return run_of(job.notebook, job.params) if job.notebook in ("02_judge", "03_train") else None


def fault(label, root):
    "Break once, in the way that is next in faults.json"
    path = Path(root) / "faults.json"
    if not path.is_file(): return
    with open(path.with_suffix(".lock"), "w") as f:   # two workers take theirs one after the other, so that no fault comes twice
        fcntl.flock(f, fcntl.LOCK_EX)
        faults = json.loads(path.read_text())
        if not faults.get(label): return
        how = faults[label].pop(0)
        write_json(path, faults)
    if how == "process": os.kill(os.getpid(), signal.SIGKILL)
    if how == "kernel": raise DeadKernelError("Kernel died")
    if how == "full":
        with open("/dev/full", "w") as f: f.write("x")
    if how == "error": raise UserError("steps: found -3, allowed: more")
    if how == "hang": time.sleep(600)


def execute(source, copy, params, progress, kernels=None):
    "What papermill would do"
    name, root = Path(source).name, Path(params["runs"])
    write_text(copy, json.dumps(dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)))
    label = " ".join(filter(None, [params["model"], name, params.get("arm"), f"seed{params['seed']}" if "seed" in params else ""]))
    if "grids" not in root.parts: fault(label, root)
    time.sleep(float(os.environ.get("TOY_SECONDS", ".02")))
    if name in ("02_judge", "03_train"): _train(name, params)
    elif name == "04_evaluate": _evaluate(params)
    else: _compare(name, params, root)


def _train(name, params):
    run = run_of(name, params)
    if run.finished: raise UserError(f"{run.path} is finished; pass replace=True")
    run = Run.create(run.root, params["model"], run.arm, run.seed, {k: v for k, v in params.items() if k not in ("runs", "run", "panel")})
    with run.lock():
        write_text(run / "metrics.jsonl", f"{params.get('arm')} {params.get('seed')}\n")
        write_text(run / "adapter" / "adapter_model.safetensors", str(params.get("arm")) * 50)
        write_json(run / "calibration.json", dict(fit=True))
        time.sleep(float(os.environ.get("TOY_SECONDS", ".02")))
        run.finish(dict(score=run.seed))
        append_jsonl(run.root / "trained.jsonl", dict(run=run.path.name, arm=run.arm))


def _evaluate(params):
    run = Run(params["run"]) if params.get("run") else base_run(params)
    asked, was = dict(samples=params.get("samples", 4)), run / "evals" / "manifest.json"
    if was.is_file() and read_json(was)["asked"] != asked and not params.get("replace"): raise UserError(f"{was} was made with {read_json(was)['asked']}; pass replace=True to run it again")
    write_json(was, dict(asked=asked, tasks={t: dict(status="skipped", reason="its data are not here") for t in os.environ.get("TOY_SKIPS", "").split()}))
    write_text(run / "evals" / "expression.parquet", f"{run.arm} {run.seed} {asked['samples']}")
    if run.arm == "base" and not run.finished: run.finish({})


def base_run(params):
    found = find_runs(Path(params["runs"]), params["model"], "base", finished=False)
    return found[-1] if found else Run.create(params["runs"], params["model"], "base", 0, dict(model=params["model"]))


def _compare(name, params, root):
    out = Path(params["out"])
    rows = {p.parent.parent.relative_to(root).as_posix(): p.read_text() for p in sorted(root.glob("*/*/*/evals/*.parquet"))}
    if name == "05_compare": write_json(out / "contrasts.json", dict(rows=rows, model=params["model"]))
    else: write_text(out / "figures" / "forest.csv", ",".join(read_json(out / "contrasts.json")["rows"]))


def _place(task):
    if task.place: return Path(task.place)
    return base_run(task.params).path


class Here:
    "An executor without processes: a task is done when it is started"
    def __init__(self): self.done = []
    def room(self, need): return not self.done
    def start(self, key, fn, *args, need=None):
        try: self.done.append(Ended(key, fn(*args)))
        except RuntimeError as e: self.done.append(Ended(key, failed=str(e)))
    def wait(self, timeout=None): done, self.done = self.done, []; return done
    def kill(self): self.done = None
    def close(self): pass


def work(task):
    "The real work function around the stand-ins"
    ledger._execute, ledger.notebook_path, ledger._place = execute, Path, _place
    return real_work(task)


def bare(task):
    "The real work function; only the notebook is not executed, its result is put there"
    def execute(source, copy, params, progress, kernels=None):
        write_text(copy, json.dumps(dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)))
        if task.notebook == "05_compare": write_json(Path(task.place) / "contrasts.json", dict(rows=[]))
        elif task.notebook == "06_figures": write_text(Path(task.place) / "figures" / "forest.csv", "")
        elif task.notebook == "04_evaluate": write_text((Path(task.place) if task.place else measured_base(params)) / "evals" / "expression.parquet", "")
        else: write_json(Path(task.place) / "result.json", {})
    ledger._execute = execute
    return real_work(task)


def measured_base(params):
    from hmx_feel.panel import find_run
    run = find_run(ledger.config_of("04_evaluate", params))
    return run if run.finished else run.finish({})


def install(patch=setattr):
    "Let the driver of this process use the stand-ins"
    patch(ledger, "work", work)
    patch(ledger, "expected_run", expected_run)
    for name in ("_execute", "notebook_path", "_place"): patch(ledger, name, getattr(ledger, name))   # `work` sets them, also in this process
    patch(ledger, "check_grid", check_grid)
    patch(ledger, "_trained", lambda p: {})   # identities, as `check_grid` asks for them
    patch(grids, "cost_of", None)
    patch(ledger, "cost_of", lambda *a: grids.Cost(.01, .01, .01))


def check_grid(p):
    wrong = next((s for s in p.states.values() if s.word == "edited"), None)
    if wrong: real_check(p)


real_check = ledger.check_grid


def drive(root, executor=None, again=False, say=lambda line: None, retries=2, **change):
    "Run the toys; returns the progress"
    return ledger.run_grid(make(**change), root, executor or Here, retries, again, say)


def two(): return Local(2, memory=64., cores=2)


def many(root, seeds=5000):
    "A grid of two arms with as many finished runs as two times the seeds, as they would lie there"
    name = root / "many.yaml"
    name.write_text(json.dumps(dict(name="many", models=["tiny"], arms=["forward", "reverse"], seeds=list(range(seeds)))))
    grid = grids.load_grid(name)
    p = ledger.Progress(grid, root, whole=False, exact=False)
    rows, index, commit = [], [], ledger._commit()
    for label, s in p.states.items():
        if s.job.notebook != "03_train": continue
        path = f"tiny/{s.job.arm}/seed{s.job.seed}-{int(s.stamp[:8], 16):08x}"
        (root / path).mkdir(parents=True)
        (root / path / "config.json").write_text("{}")
        (root / path / "result.json").write_text("{}")
        rows.append(json.dumps(dict(label=label, event="finished", stamp=s.stamp, path=path, files={"result.json": [2, ""], "config.json": [2, ""]}, time=0, commit=commit, schema=1)))
        index.append(json.dumps(dict(path=path, model="tiny", arm=s.job.arm, seed=s.job.seed, id8=path[-8:], schema=1)))
    (root / "grids" / "many").mkdir(parents=True)
    (root / "grids" / "many" / "ledger.jsonl").write_text("\n".join(rows) + "\n")
    (root / "index.jsonl").write_text("\n".join(index) + "\n")


if __name__ == "__main__":
    install()
    drive(Path(sys.argv[1]), two, say=lambda line: print(line, flush=True), **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
