"""The experiment notebooks, run by papermill as a user runs them, with parameters so small that a laptop does not notice.

One chain on the embedded model (calibrate, train twice, evaluate three times, compare, draw), then the stand-ins.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import standins
from safetensors.torch import load_file

from hmx_feel import runs, sweep
from hmx_feel.runs import find_runs

nbs = Path(__file__).resolve().parents[1] / "nbs"
papermill = Path(sys.executable).with_name("papermill")
NAMES = ("01_rubric", "02_judge", "03_train", "04_evaluate", "05_compare", "06_figures")
SMALL = dict(steps=2, completions_per_step=16, max_completion=64)
GLANCE = dict(panel="smoke", samples=1)


def mill(name, out, **params):
    "papermill, started in nbs/ as README says; returns the finished process"
    given = [part for k, v in params.items() for part in ("-p", k, str(v))]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}   # a kernel shows figures unless told otherwise
    return subprocess.run([str(papermill), f"{name}.ipynb", str(out), *given], cwd=nbs, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def milled(name, out, **params):
    "The same, expected to succeed; returns the executed notebook"
    done = mill(name, out, **params)
    assert done.returncode == 0, f"{name} {params}\n{done.stderr[-3000:]}"
    return nbformat.read(out, 4)


def test_all_are_there(): assert [p.stem for p in sorted(nbs.glob("[0-9]*.ipynb"))] == list(NAMES)


@pytest.mark.parametrize("name", sweep.CONFIGS)
def test_parameters_cell_is_the_config(name):
    "Names, order, defaults and meanings stand in the config; the cell is a copy"
    nb = nbformat.read(nbs / f"{name}.ipynb", 4)
    tagged = [c.source for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [getattr(runs, sweep.CONFIGS[name]).parameters()]
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    after = code[code.index(tagged[0]) + 1]
    assert f"{sweep.CONFIGS[name]}.from_notebook(globals())" in after, f"{name}: the cell after the parameters has to check them"


@pytest.fixture(scope="module")
def out(tmp_path_factory): return tmp_path_factory.mktemp("executed")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, out):
    "The main job in small, in one folder of runs"
    root = tmp_path_factory.mktemp("chain")
    made = {"judge": milled("02_judge", out / "judge.ipynb", runs=root, headroom_prompts=2)}
    for arm in ("forward", "reverse"): made[arm] = milled("03_train", out / f"{arm}.ipynb", runs=root, arm=arm, **SMALL)
    for arm in ("base", "forward", "reverse"): made[f"evaluate {arm}"] = milled("04_evaluate", out / f"{arm}_eval.ipynb", runs=root, arm=arm, **GLANCE)
    made["compare"] = milled("05_compare", out / "compare.ipynb", runs=root, resamples=200)
    made["figures"] = milled("06_figures", out / "figures.ipynb", runs=root)
    return root, made


def outputs(nb): return [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]


def test_chain_runs_without_errors_or_noise(chain):
    for name, nb in chain[1].items():
        assert not [o for o in outputs(nb) if o.output_type == "error"], name
        noise = [o.text for o in outputs(nb) if o.output_type == "stream" and o.name == "stderr" and "Warning" in o.text]
        assert noise == [], f"{name} shows warnings of other packages"


def test_calibration(chain):
    run, = find_runs(chain[0], "tiny", "judge")
    result = run.read_json("calibration.json")
    assert 0 <= result["agreement_min"] <= 1 and run.finished and result["sentence"].startswith("tiny is")
    assert {"scores.parquet", "headroom.parquet"} <= {p.name for p in run.path.iterdir()}
    for name in ("exam", "types", "sensitivity", "headroom"): assert {p.suffix for p in (run / "figures").glob(f"{name}.*")} == {".png", ".pdf", ".csv"}, name
    for arm in ("forward", "reverse"):
        trained, = find_runs(chain[0], "tiny", arm)
        asked = trained.read_json("config.json")
        assert asked["asked"].get("noise_floor") is None and asked["resolved"]["noise_floor"] == result["noise_floor"], "training did not read the calibration"


def moved(run):
    "How far a run's adapter has come: LoRA starts with B = 0"
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return max(float(v.abs().max()) for k, v in tensors.items() if "lora_B" in k)


@pytest.mark.parametrize("arm", ["forward", "reverse"])
def test_run_folder(chain, arm):
    run, = find_runs(chain[0], "tiny", arm)
    assert {"config.json", "env.json", "metrics.jsonl", "timings.jsonl", "completions", "drift", "adapter", "result.json"} <= {p.name for p in run.path.iterdir()}
    pickled = [p for p in run.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    own = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}   # Trainer's own, to go on from a checkpoint
    assert not list(run.path.rglob("*.tmp")) and all(p.parts[len(run.path.parts)] == "checkpoints" and p.name in own for p in pickled), pickled
    assert moved(run), "the adapter is where it began: nothing was trained"
    metrics = run.metrics()
    assert len(metrics) == SMALL["steps"] and metrics.score.between(0, 1).all() and {"feeling.shade", "held.stance", "missing"} <= set(metrics.columns)
    assert not [c for c in metrics.columns if "time" in c or "second" in c], "clock values belong into timings.jsonl"
    config = run.read_json("config.json")
    assert config["resolved"]["steps"] == SMALL["steps"] and config["trainer"]["max_steps"] == SMALL["steps"]
    lines = [json.loads(line) for line in (chain[0] / "index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in lines].count(run.path.relative_to(chain[0]).as_posix()) == 1


def test_reports_show_pictures(chain):
    for name in ("judge", "forward", "reverse", "compare", "figures"):
        shown = [o for o in outputs(chain[1][name]) if "image/png" in o.get("data", {})]
        assert shown, f"{name} shows no figure"


def test_evaluations(chain):
    root = chain[0]
    rows = [sorted((run.path / "evals").glob("*.parquet")) for arm in ("base", "forward", "reverse") for run in find_runs(root, "tiny", arm)]
    assert len(rows) == 3 and len({tuple(p.name for p in r) for r in rows}) == 1 and rows[0]
    items = [pd.read_parquet(next(p for p in r if p.stem == "expression")) for r in rows]
    want = {"run_id", "task", "item_id", "cluster", "condition", "order", "prompt_sha", "metric", "value", "raw", "parsed", "missing", "schema"}
    for t in items: assert want <= set(t.columns) and set(t.prompt_sha) == set(items[0].prompt_sha)


def test_comparison_and_figures(chain):
    folder = chain[0] / "compare" / "tiny"
    found = sweep.read_contrasts(folder)
    for pair in (("forward", "base"), ("base", "reverse")):
        c = sweep.contrast_of(found, *pair)
        assert c["low"] <= c["estimate"] <= c["high"]
    assert {p.suffix for p in folder.rglob("*")} >= {".png", ".pdf", ".csv"}
    assert "expression" in sweep.text_table(found)
    result = sweep.demo_result(chain[0], 1.)
    assert {"forward_minus_base", "base_minus_reverse", "forward_minus_base_low", "base_minus_reverse_high", "judge_agreement_min", "seconds"} <= set(result)


def test_same_seed_same_run(chain, out, tmp_path):
    "Two runs of one seed leave the same bytes"
    one, = find_runs(chain[0], "tiny", "forward")
    known = {k: one.read_json("config.json")["resolved"][k] for k in ("noise_floor", "layout")}   # what its calibration said
    milled("03_train", out / "again.ipynb", runs=tmp_path, **known, **SMALL)
    (one,), (two,) = find_runs(chain[0], "tiny", "forward"), find_runs(tmp_path, "tiny", "forward")
    assert one.path.name == two.path.name
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"): assert (one.path / file).read_bytes() == (two.path / file).read_bytes(), file


def test_finished_run_is_refused(chain, out):
    done = mill("03_train", out / "twice.ipynb", runs=chain[0], arm="forward", **SMALL)
    assert done.returncode != 0 and "is finished; pass replace=True" in done.stderr.strip().splitlines()[-1]


def test_rubric_notebook_runs_headless(out): assert not [o for o in outputs(milled("01_rubric", out / "rubric.ipynb")) if o.output_type == "error"]


def test_the_command_runs_the_notebook(tmp_path):
    "hmx-feel train is the same run, and leaves its report in the run folder"
    argv = [Path(sys.executable).with_name("hmx-feel"), "train", "--arm", "reverse", "--seed", "1", "--runs", tmp_path]
    argv += [part for k, v in SMALL.items() for part in (f"--{k.replace('_', '-')}", v)]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, = find_runs(tmp_path, "tiny", "reverse", 1)
    assert done.stdout == f"{run.path / 'report.ipynb'}\n" and nbformat.read(run.path / "report.ipynb", 4)
    assert "Traceback" not in done.stderr


# --- any causal language model -------------------------------------------------------------------------------

@pytest.mark.parametrize("family", standins.FAMILIES)
def test_standins_train_and_evaluate(family, tmp_path, out):
    "A random model hardly ever names a score, so here every mass will do"
    folder = standins.make_standin(family, tmp_path / family)
    root = tmp_path / "runs"
    milled("03_train", out / f"{family}.ipynb", model=folder, runs=root, min_mass=0, **{**SMALL, "steps": 3})
    run, = find_runs(root, str(folder), "forward")
    assert len(run.metrics()) == 3 and run.metrics().score.notna().all() and moved(run)
    milled("04_evaluate", out / f"{family}_eval.ipynb", model=folder, arm="forward", runs=root, **GLANCE)
    assert list((run.path / "evals").glob("*.parquet"))


def test_labels_of_several_tokens_are_trained_with(tmp_path, out):
    folder = standins.make_standin("llama", tmp_path / "split", split_labels=True)
    milled("03_train", out / "split.ipynb", model=folder, runs=tmp_path / "runs", min_mass=0, **SMALL)
    run, = find_runs(tmp_path / "runs", str(folder), "forward")
    assert run.metrics().score.between(0, 1).all()


# --- bad input under papermill: the last line says it --------------------------------------------------------

@pytest.mark.parametrize(("params", "pieces"), [
    (dict(modle="tiny"), ["unknown parameter 'modle'", "(nearest: 'model')"]),
    (dict(arm="forwrad"), ["arm: found 'forwrad'", "(nearest: 'forward')"]),
    (dict(steps=-3), ["steps: found -3", "allowed: a whole number >= 1"]),
    (dict(seed="x"), ["seed: found 'x'", "allowed: a whole number"]),
    (dict(model="./nowhere"), ["no folder", "'./nowhere'"]),
    (dict(judge="bose"), ["judge", "'bose'"]),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_parameters(tmp_path, params, pieces):
    root = tmp_path / "runs"
    done = mill("03_train", tmp_path / "out.ipynb", runs=root, **params)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("UserError: ") and all(p in last for p in pieces), done.stderr[-2000:]
    assert not root.exists(), "something was written"


@pytest.mark.skipif(not os.environ.get("HMX_BENCHMARKS"), reason="needs the data of TruthfulQA: set HMX_BENCHMARKS")
def test_truthfulqa_on_the_real_data(tmp_path, out):
    milled("04_evaluate", out / "truthfulqa.ipynb", runs=tmp_path, **GLANCE)
    run, = find_runs(tmp_path, "tiny", "base")
    assert len(pd.read_parquet(run.path / "evals" / "truthfulqa_mc1.parquet").item_id.unique()) == 4
