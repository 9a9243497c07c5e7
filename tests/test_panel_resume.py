"""An evaluation that is killed at any moment ends with the rows of one that was not."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from standins import make_standin

from hmx_feel import panel
from hmx_feel.panel import evaluate, evaluate_all, read_rows
from hmx_feel.policy import check_model, load_policy, model_id
from hmx_feel.runs import EvaluateConfig, Run, UserError

torch.set_num_threads(1)
notebooks = Path(__file__).resolve().parents[1] / "nbs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A stand-in and a panel of three tasks, one of each kind"
    home = tmp_path_factory.mktemp("resume")
    make_standin("qwen3", home / "model")
    with open(home / "quiz.jsonl", "w") as f:
        for i in range(60):
            words = random.Random(i).sample(["crow", "oak", "iron", "trout", "pear", "drill", "owl", "saw"], 3)
            ask = "Which one do you mean? " + "very " * (i % 7) + " ".join(f"{x}) {w}" for x, w in zip("ABC", words, strict=True))
            f.write(json.dumps(dict(id=f"q{i}", cluster=f"c{i % 5}", condition="", messages=[dict(role="user", content=ask)], options=["A", "B", "C"], gold=i % 3, hint=None, biased=None)) + "\n")
    (home / "mine.yaml").write_text("""name: mine
tasks:
- {name: quiz, kind: lm_eval, items: quiz.jsonl, metrics: {acc: higher}, cluster: cluster, relation: isolated}
- {name: expression, kind: expression, metrics: {rubric: descriptive}, cluster: family, relation: trained, limit: 12, max_new: 12}
- {name: deep, kind: measure, measure: hmx_feel.expression.measured, metrics: {expression: descriptive}, cluster: family, relation: trained, limit: 8, options: {max_new: 12}}
""")
    return home


def config(folder, runs, **kw): return EvaluateConfig(model=str(folder / "model"), panel=str(folder / "mine.yaml"), samples=2, min_mass=0, batch_size=4, benchmarks=str(folder), runs=str(runs), **kw)


def papermilled(config):
    "The process of papermill with the evaluation notebook"
    given = [x for k, v in config.changed().items() for x in ("-p", k, v)]
    argv = [Path(sys.executable).with_name("papermill"), "04_evaluate.ipynb", config.root / "out.ipynb", "--no-progress-bar", *given]
    config.root.mkdir(exist_ok=True)
    return subprocess.Popen(list(map(str, argv)), cwd=notebooks, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid


def forked(config):
    pid = os.fork()
    if pid == 0:
        try: evaluate(config)
        finally: os._exit(0)
    return pid


def killed(config, after, start=forked, seconds=120):
    "Evaluate in a process that is killed, with the kernel that it may have, when its journal has so many lines; returns whether it was killed"
    pid, end = start(config), time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]: return False
            files = list(config.root.glob("*/base/*/evals/.partial.jsonl"))
            if files and files[0].read_bytes().count(b"\n") >= after: return True
            time.sleep(.002)
        raise AssertionError("the evaluation neither ended nor went on")
    finally:
        for p in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)] if psutil.pid_exists(pid) else []: p.kill()
        if psutil.pid_exists(pid): os.waitpid(pid, 0)


def test_killed_five_times(folder, tmp_path, monkeypatch):
    "At random moments of its tasks, the last time as a notebook with its kernel; the rows are equal to the last digit and nothing is computed twice"
    whole = evaluate(config(folder, tmp_path / "whole"))
    seen, real = [], panel.Journal.put
    monkeypatch.setattr(panel.Journal, "put", lambda self, said: seen.append(len(said)) or real(self, said))
    batches = len(seen)
    evaluate(config(folder, tmp_path / "again"))
    batches, torn = len(seen), config(folder, tmp_path / "torn")
    assert batches >= 15
    moments = sorted(random.Random(0).sample(range(2, batches - 1), 5))
    assert [killed(torn, m) for m in moments[:4]] == [True] * 4 and killed(torn, moments[4], papermilled)
    seen.clear()
    run = evaluate(torn)
    assert 0 < len(seen) <= batches - moments[-1] + 1
    pd.testing.assert_frame_equal(read_rows(run), read_rows(whole), check_exact=True)
    assert not (run / "evals" / ".partial.jsonl").exists() and run.finished


def test_three_runs_in_one_process_load_the_weights_once(folder, tmp_path, monkeypatch):
    "and each has the rows that it has alone"
    base = config(folder, tmp_path / "runs")
    for i in (0, 1):
        run = Run.create(base.root, base.model, "forward", i, dict(weights=model_id(check_model(base.model))))
        torch.manual_seed(i)
        net = get_peft_model(load_policy(base.model).model, LoraConfig(r=4, target_modules="all-linear"))
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "lora_B" in name: p.normal_(0, .3)
        net.save_pretrained(run / "adapter")
        run.finish({})
    asked = [base, *(config(folder, tmp_path / "runs", arm="forward", seed=i) for i in (0, 1))]
    loads, real = [], panel.load_plain
    monkeypatch.setattr(panel, "load_plain", lambda *a, **kw: loads.append(a) or real(*a, **kw))
    together = [read_rows(r) for r in evaluate_all(asked)]
    assert len(loads) == 1
    assert len({tuple(t[t.task == "quiz"].raw) for t in together}) == 3
    alone = [read_rows(evaluate(c.model_copy(update=dict(replace=True)))) for c in reversed(asked)][::-1]
    assert len(loads) == 4
    for a, b in zip(together, alone, strict=True): pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_a_cassette_rebuilds_tables_where_torch_is_not(folder, tmp_path):
    "Equal values and byte-equal csv and json, in a process that can import neither torch, transformers nor lm_eval"
    import gzip
    import subprocess
    import sys

    from hmx_feel.cassette import read_cassette, write_cassette
    from hmx_feel.stats import summary
    run = evaluate(config(folder, tmp_path / "runs"))
    tape = write_cassette(run, tmp_path / "tape.jsonl.gz")
    code = ("import sys\n"
            "class Stop:\n"
            "    def find_spec(self, name, *a):\n"
            "        if name.split('.')[0] in ('torch', 'lm_eval', 'transformers', 'peft'): raise ImportError(name)\n"
            "sys.meta_path.insert(0, Stop())\n"
            "from pathlib import Path\nfrom hmx_feel.cassette import play\nfrom hmx_feel.panel import read_rows\nfrom hmx_feel.stats import summary\n"
            f"rows = read_rows(play({str(tape)!r}, {str(tmp_path / 'again')!r})); out = Path({str(tmp_path)!r})\n"
            "(out / 't.csv').write_text(summary(rows).to_csv()); (out / 't.json').write_text(rows.to_json(orient='records'))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(run)
    assert (tmp_path / "t.csv").read_text() == summary(rows).to_csv() and (tmp_path / "t.json").read_text() == rows.to_json(orient="records")
    again, = (Run(p.parent) for p in (tmp_path / "again").glob("*/base/*/config.json"))
    for name in ("evals/manifest.json", "config.json", "result.json"): assert (again / name).read_bytes() == (run / name).read_bytes()
    lines = gzip.decompress(tape.read_bytes()).splitlines(keepends=True)
    for kept, says in ((lines[:-5], r"found \d+ of \d+ rows, allowed: a whole cassette"), ([b'{"manifest": {}, "schema": 1}\n'], "no first line with manifest and keys")):
        tape.write_bytes(gzip.compress(b"".join(kept)))
        with pytest.raises(UserError, match=says): read_cassette(tape)
