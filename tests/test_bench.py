"""The benchmarks of nbs/bench, in small: they run, write what they promise, and compute equal scores. How fast is not asked here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

bench = Path(__file__).resolve().parents[1] / "nbs" / "bench"
papermill = Path(sys.executable).with_name("papermill")
KEYS = {"judge": {"rubric_first_vs_baseline", "criterion_last_share_of_bound", "rubric_first_vs_generate8", "rubric_first_vs_generate64",
                  "max_score_diff", "matmul_peak_share", "train_step_1m", "train_step_42m"},
        "grid": {"overhead_ms_per_run", "status_seconds_10000_runs", "rerun_seconds", "lost_rows"},
        "stats": {"fpr_mcnemar", "fpr_sign_flip", "fpr_swap", "fpr_training_level", "fpr_training_level_max", "fwer_holm", "coverage_mean", "coverage_ratio", "coverage_training", "seconds_70_cells", "peak_gib_70_cells"},
        "panel": {"mc2_time_vs_lm_eval", "bbq_time_vs_lm_eval", "three_arms_time_vs_lm_eval", "max_loglik_diff", "mc1_decisions_differing"},
        "training": {"peak_memory_vs_no_judge"}}
COLUMNS = {"judge": {"model", "tokens", "layout", "seconds", "computed", "ratio"}, "grid": {"what", "n", "seconds"}, "panel": {"model", "layout", "seconds", "computed", "ratio"},
           "training": {"reward", "peak", "loaded"}, "stats": {"group", "name", "value", "low", "high", "nominal", "comparisons"}}


def test_every_benchmark_has_its_keys_here(): assert {p.stem for p in bench.glob("*.ipynb")} == set(KEYS)


@pytest.fixture(scope="module", params=sorted(KEYS))
def done(request, tmp_path_factory):
    "A benchmark's name and its folder of results, after a run as `make bench` starts it"
    name, out = request.param, tmp_path_factory.mktemp(request.param)
    argv = [papermill, "--cwd", bench, bench / f"{name}.ipynb", out / "executed.ipynb", "-p", "smoke", "True", "-p", "threads", "1", "-p", "out", out]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    ran = subprocess.run(list(map(str, argv)), env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return name, out


def test_numbers_are_flat_and_complete(done):
    name, out = done
    numbers = json.loads((out / f"{name}.json").read_text())
    assert set(numbers) == KEYS[name]
    assert all(isinstance(v, float) and v >= 0 for v in numbers.values()), numbers
    assert numbers.get("max_score_diff", 0) < 1e-4 and numbers.get("max_loglik_diff", 0) < 1e-4
    assert numbers.get("lost_rows", 0) == 0 and numbers.get("mc1_decisions_differing", 0) == 0


def test_details_and_machine_stand_beside_them(done):
    name, out = done
    env = json.loads((out / f"{name}_env.json").read_text())
    if name == "training": env = env["peak_memory_vs_no_judge"]   # several programs measure its numbers
    assert env["smoke"] is True and env["threads"] == 1 and {"cores", "packages", "commit", "date"} <= set(env)
    details = pd.read_csv(out / f"{name}_details.csv")
    assert COLUMNS[name] <= set(details.columns)
    if name == "training":
        assert set(details.reward) == {"constant", "rubric_first", "criterion_last"} and details.peak.ge(details.loaded).all()
        return
    assert details.value.between(0, 1).all() if name == "stats" else details.seconds.gt(0).all()
    for figure in out.glob("*.png"): assert figure.with_suffix(".pdf").is_file() and figure.with_suffix(".csv").is_file()
    assert list(out.glob("*.png"))


def test_unknown_parameters_are_refused(tmp_path):
    "Papermill itself only warns"
    argv = [papermill, "--cwd", bench, bench / "judge.ipynb", tmp_path / "x.ipynb", "-p", "smok", "True"]
    ran = subprocess.run(list(map(str, argv)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode != 0 and "unknown parameter 'smok' (nearest: 'smoke')" in ran.stderr and not list(tmp_path.glob("*.json"))


def test_the_program_for_a_gpu_runs_in_small(tmp_path):
    "With TRL alone where there is no GPU: the judge's share, and the base judge unmoved by two steps that move the live one"
    argv = [sys.executable, Path(__file__).with_name("on_gpu.py"), tmp_path, "--smoke", "--steps", "2", "--models", "qwen3-0.6b", "--backends", "trl"]
    ran = subprocess.run(list(map(str, argv)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    numbers, env = (json.loads((tmp_path / f"gpu{part}.json").read_text()) for part in ("", "_env"))
    assert 0 < numbers["qwen3-0.6b_judge_share_trl"] < 1
    about = env["qwen3-0.6b_judge_share_trl"]
    assert about["smoke"] and (about["groups"], about["tokens"]) == (2, 16) and about["base_identical"] and about["live_moved"]
    assert pd.read_csv(tmp_path / "gpu_details.csv").lengths.tolist() == ["[16.0]"]
