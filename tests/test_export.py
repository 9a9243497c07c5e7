"""One table for other programs, and a cassette: what is made from either equals what was made from the runs."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from hmx_feel.cli import main
from hmx_feel.export import BOOK, TIDY, run_book, run_rows
from hmx_feel.panel import COLUMNS
from hmx_feel.runs import Run, find_runs, write_parquet
from hmx_feel.verdict import plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    plant(root, "base", n=24)
    for seed in (0, 1):
        for arm in ("forward", "placebo"): plant(root, arm, seed, .2 * (arm == "forward"), n=24)
    return root


@pytest.fixture
def spoken(tmp_path):
    "A run with a checkpoint beside its end, a cross-judge, an unreadable answer and a missing score"
    run = Run.create(tmp_path, "tiny", "forward", 3, dict(steps=0)).finish({})
    base = dict(run_id=run.id8, task="expression", order=0, prompt_sha="p", parsed="", condition="plain", cluster="f1")
    rows = [dict(base, item_id="a", sample=k, metric=m, value=v, raw=t, missing=np.isnan(v)) for k, t in enumerate(("Two crows, I think.", ""))
            for m, v in (("rubric", .5), ("cross.feeling.shade", [.25, np.nan][k]), ("incoherent", float(k)), ("words", [4., 0][k]))]
    for place, step in (("evals", 0), ("evals/step-000020", 20)):
        write_parquet(run / place / "expression.parquet", pd.DataFrame(rows)[COLUMNS])
        note = dict(status="done", settings=dict(task=dict(kind="measure", cluster="family"), step=step, dose=1.), data=dict(judges=["base", "cross"], rubric_hash="abc"),
                    metrics=dict(rubric="descriptive"), relation="trained", endpoint="rubric")
        run.write_json(f"{place}/manifest.json", dict(tasks=dict(expression=note, gone=dict(status="skipped", reason="no data", settings={}))))
    return run


def test_columns_say_who_gave_a_number_and_to_what(spoken):
    rows, book = run_rows(spoken), run_book(spoken)
    assert list(rows.columns) == TIDY and len(rows) == 16 and set(rows.step) == {0, 20}
    end = rows[rows.step == 0].set_index(["criterion", "sample"])
    assert end.judge["feeling.shade"].tolist() == ["cross"] * 2 and end.judge["rubric"].tolist() == ["base"] * 2 and end.judge["words"].tolist() == ["text"] * 2
    assert end.length["rubric", 0] == 4 and np.isnan(end.length["rubric", 1])
    assert end["flags"]["feeling.shade"].tolist() == ["", "missing;incoherent"] and end["flags"]["rubric", 1] == "incoherent"
    assert list(book.columns) == BOOK and set(book.version) == {"abc"} and set(book.cluster) == {"family"} and set(book.relation) == {"trained"}
    assert book.loc[book.endpoint, "criterion"].unique().tolist() == ["rubric"]


def test_the_command_writes_three_files(planted, tmp_path, capsys):
    assert main(["export", "--runs", str(planted), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in ("rows.csv", "rows.parquet", "codebook.csv")]
    table = pd.read_csv(tmp_path / "rows.csv")
    assert len(table) == len(pd.read_parquet(tmp_path / "rows.parquet")) == sum(len(run_rows(r)) for r in find_runs(planted)) and set(table.arm) == {"base", "forward", "placebo"}
    assert main(["export", "--runs", str(planted), "--model", "qwen3-4b"]) == 2 and "no evaluated run of qwen3-4b" in capsys.readouterr().err


COMPARE = """import sys
class Stop:
    def find_spec(self, name, *a):
        if name.split('.')[0] in ('torch', 'lm_eval', 'transformers', 'peft'): raise ImportError(name)
sys.meta_path.insert(0, Stop())
from hmx_feel.figures import verdict_forest
from hmx_feel.plots import save_figure
from hmx_feel.runs import CompareConfig
from hmx_feel.verdict import compare
for root in sys.argv[1:]:
    found = compare(CompareConfig(runs=root, arms='forward,placebo', resamples=200))
    fig, data = verdict_forest(found)
    save_figure(fig, found.out / 'forest', data)
"""


def test_a_comparison_from_cassettes_is_the_comparison(planted, tmp_path, capsys):
    "Equal bytes of every table and of a figure's data, where neither torch nor transformers nor lm_eval can be imported"
    for run in find_runs(planted):
        tape = tmp_path / f"{run.id8}.jsonl.gz"
        assert main(["cassette", "write", str(run.path), str(tape)]) == 0 and main(["cassette", "play", str(tape), "--runs", str(tmp_path / "again")]) == 0
    assert main(["cassette", "write", str(run.path), str(tmp_path / "x"), "--step", "5"]) == 2 and "evals/step-000005" in capsys.readouterr().err
    assert main(["cassette", "play", "a", "b"]) == 2 and "found 2 paths, allowed: one file" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-c", COMPARE, planted, tmp_path / "again"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {p.relative_to(planted).as_posix(): p.read_bytes() for p in (planted / "compare").rglob("*.csv")}
    assert len(made) > 5 and any("forest" in n for n in made)
    assert made == {p.relative_to(tmp_path / "again").as_posix(): p.read_bytes() for p in (tmp_path / "again" / "compare").rglob("*.csv")}


@pytest.mark.parametrize("data, said", [({}, ""), (dict(commit="c1", files=dict(a=dict(commit="c2"))), "c1"), (dict(files=dict(test=dict(commit="c1", sha1="s"), train=dict(commit="c1"))), "c1"),
                                        (dict(files=dict(a=dict(commit="c1"), b=dict(sha1="s2"))), "c1 s2"), (dict(files=[dict(sha1="s1")]), "s1"), ({"a.jsonl": "0" * 40, "b.jsonl": "f" * 40}, "0" * 40 + " " + "f" * 40)])
def test_the_version_of_data_in_several_files(data, said):
    from hmx_feel.export import version_of
    assert version_of(data) == said
