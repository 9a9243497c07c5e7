"Figures of the drift ledger on real runs of tiny, the onset as it is found, recorded and drawn, and the tutorials as a reader runs them"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from hmx_feel.drift import run_onset
from hmx_feel.drift_plots import (BY_ARM, MEASURES, PANELS, STANCE_LOOKS, drift_by_arm, drift_curves, drift_table, onset_evidence, onset_figure, onset_sentence,
                                  ordered, probe_rows, readout, runs_of, stance_shares)
from hmx_feel.grpo import train
from hmx_feel.plots import arm_look, save_figure
from hmx_feel.runs import Run, TrainConfig, UserError, read_parquet, write_parquet
from hmx_feel.stats import contrast_table

tutorials = Path(__file__).resolve().parents[1] / "nbs" / "tutorials"


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("arms")


@pytest.fixture(scope="module")
def arms(root):
    "Two arms of tiny, trained for a few steps"
    small = dict(steps=4, completions_per_step=16, micro_batch=16, max_completion=40, probe_every=4, save_every=4, report_to="", runs=str(root))
    return {arm: train(TrainConfig(arm=arm, **small)) for arm in ("forward", "reverse")}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words_at_ends(ax): return {t.get_text() for t in ax.texts}


# --- one run -------------------------------------------------------------------------------------------------

def test_the_table_joins_both_files(arms):
    run = arms["forward"]
    table, looks = drift_table(run), pd.DataFrame(run.read_jsonl("drift.jsonl"))
    assert table.step.tolist() == [0, 1, 2, 3, 4] and table["base.rubric"].notna().tolist() == [True, False, False, False, True]
    assert np.isnan(table.reward[0]) and table.reward[1:].tolist() == run.metrics().reward.tolist()
    assert table.kl[1] == pytest.approx(looks.kl[1] / 4) and table.kl[4] == looks.kl[1] > 0
    assert table.held[4] == looks["base.held.reader"].iloc[1] != looks["base.held.need"].iloc[1]


def test_a_run_that_goes_on_has_no_kl_after_its_last_look(arms, tmp_path):
    shutil.copytree(arms["forward"].path, tmp_path / "tiny" / "forward" / arms["forward"].path.name)
    run = Run(tmp_path / "tiny" / "forward" / arms["forward"].path.name)
    (run / "result.json").unlink()
    lines = (run / "drift.jsonl").read_text().splitlines(keepends=True)
    (run / "drift.jsonl").write_text("".join(lines[:1]))
    assert drift_table(run).kl.isna().tolist() == [False, True, True, True, True]
    fig, data = drift_curves(run)
    assert len(data) == 5 and onset_evidence(run).found is None


@pytest.mark.parametrize("x", ["step", "kl"])
def test_curves_show_every_measure_where_it_was_measured(arms, x, tmp_path):
    table = drift_table(arms["forward"])
    fig, data = drift_curves(arms["forward"], x=x)
    main, shown = fig.axes[0], {words for m, (words, _, _) in MEASURES.items() if m in table}
    assert shown == words_at_ends(main) and len(fig.axes) == 1 + len(PANELS)
    looks = table.dropna(subset="base.rubric")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in main.lines]
    for m in ("base.rubric", "held", "stock.share"): assert (looks[x].tolist(), looks[m].tolist()) in lines, m
    paths = save_figure(fig, tmp_path / x, data)
    again = pd.read_csv(paths["csv"])
    pd.testing.assert_frame_equal(again[["step", "reward", "held"]], table[["step", "reward", "held"]])


def test_outside_judges_and_own_columns_are_drawn(arms):
    table = drift_table(arms["forward"])
    fig, _ = drift_curves(table.assign(**{"llama.rubric": .3}))
    assert "judge llama" in words_at_ends(fig.axes[0])
    fig, _ = drift_curves(table, measures=["score", "hedge.share"])
    assert words_at_ends(fig.axes[0]) == {"score", "hedge.share"}


def test_stances_are_shares_of_all_answers(arms):
    fig, data = stance_shares(list(arms.values()))
    assert np.allclose(data[list(STANCE_LOOKS)].sum(axis=1), 1) and len(data) == 4 and words_at_ends(fig.axes[-1]) == set(STANCE_LOOKS)
    fresh = read_parquet(arms["reverse"] / "drift" / "000004.parquet").query("source=='fresh'")
    row = data[(data.arm == "reverse") & (data.step == 4)].iloc[0]
    assert row.deny == pytest.approx((fresh.stance == "deny").mean()) and row.silent == pytest.approx((fresh.stance == "silent").mean())
    bars = stance_shares(drift_table(arms["forward"])[:1])[0].axes[0].patches
    assert sum(b.get_height() for b in bars) == pytest.approx(1)


# --- arms ----------------------------------------------------------------------------------------------------

def test_arms_keep_their_colours_and_share_their_start(arms):
    fig, data = drift_by_arm(list(arms.values()))
    first = fig.axes[0]
    dotted, *lines = first.lines
    start = data[data.step == 0]["base.rubric"]
    assert start.nunique() == 1 and dotted.get_ydata()[0] == pytest.approx(start.iloc[0])
    assert [line.get_color() for line in lines] == [arm_look(a)[0] for a in ("forward", "reverse")]
    titles = {ax.get_title(loc="left") for ax in fig.axes}
    assert BY_ARM["kl"] in titles and BY_ARM["entropy"] not in titles
    titles = {ax.get_title(loc="left") for ax in drift_by_arm(list(arms.values()), x="kl")[0].axes}
    assert BY_ARM["entropy"] in titles and BY_ARM["kl"] not in titles


def test_seeds_are_thin_and_their_mean_is_strong(arms):
    one = drift_table(arms["forward"])
    two = one.assign(seed=1, **{"base.rubric": one["base.rubric"] + .2})
    fig, _ = drift_by_arm([one, two], measures=["base.rubric"])
    thin, other, mean = fig.axes[0].lines[1:]
    assert thin.get_linewidth() == other.get_linewidth() < mean.get_linewidth()
    assert np.allclose(mean.get_ydata(), (thin.get_ydata() + other.get_ydata()) / 2)


def test_the_readout_is_what_the_rows_say(arms):
    table = readout(list(arms.values())).set_index("arm")
    assert table.index.tolist() == ["base", "forward", "reverse"] and table.step.tolist() == [0, 4, 4]
    for arm, run in arms.items():
        rows = probe_rows(run)
        mean = rows.groupby("metric").value.mean()
        assert table.loc[arm, "base.rubric"] == pytest.approx(mean["rubric"]) and table.loc[arm, "words"] == pytest.approx(mean["words"])
        assert table.loc[arm, "first_person_feeling.share"] == pytest.approx(mean["first_person_feeling"])
    assert ordered(table.reset_index(), "words").count(" ") == 2 * 3 - 1 + 2
    alike = contrast_table({a: probe_rows(r, 0) for a, r in arms.items()}, [("forward", "reverse")], resamples=200)
    assert (alike.estimate == 0).all() and alike.n_items.max() == 52, "the arms of a seed differ before training"


# --- onset ---------------------------------------------------------------------------------------------------

@pytest.fixture
def hacked(tmp_path):
    "A run folder whose completions hold a phrase that is paid and spreads from step 10 on"
    rng, run = np.random.default_rng(0), Run.create(tmp_path, "tiny", "forward", 0, {})
    some = "the path runs along a quiet river where old boats lie and nobody counts them before winter".split()
    for step in range(1, 31):
        has, held = rng.random(32) < max(0, .06 * (step - 10)), rng.normal(.4 + .01 * step, .2, 32)
        texts = [" ".join(rng.choice(some, 15)) + " I hope this helps!" * int(h) for h in has]
        rows = pd.DataFrame(dict(step=step, prompt_id=np.repeat([f"p{k}" for k in rng.choice(40, 4, replace=False)], 8), completion=texts, reward=held + rng.normal(0, .1, 32) + .5 * has))
        write_parquet(run / "completions" / f"{step:06d}.parquet", rows.assign(**{"held.reader": held}))
    for step in (0, 30): run.append("drift.jsonl", dict(step=step, kl=step / 300, **{"base.rubric": .2}))
    return run


def test_the_onset_is_named_and_marked(hacked):
    e = onset_evidence(hacked)
    assert e.found == run_onset(hacked) and 15 <= e.found["step"] <= 20 and "hope" in e.found["shortcut"]
    said = onset_sentence(e)
    assert f"at step {e.found['step']} (KL {e.found['step'] / 300:.3f})" in said and e.found["shortcut"] in said
    fig, data = onset_figure(e)
    assert len(data) == 30 and f"onset, step {e.found['step']}" in words_at_ends(fig.axes[0])
    for ax in fig.axes: assert [line for line in ax.lines if list(line.get_xdata()) == [e.found["step"]] * 2], "an axis without the mark"
    for x, at in dict(step=e.found["step"], kl=e.found["kl"]).items():
        main = drift_curves(hacked, x=x, found=e.found)[0].axes[0]
        assert [line for line in main.lines if list(line.get_xdata()) == [at] * 2], x


def test_a_recorded_onset_is_the_one_that_is_told(hacked):
    hacked.finish(dict(onset=None))
    assert onset_evidence(hacked).found is None and onset_evidence(hacked, share=.25).found, "another rule is another question"
    fig, _ = onset_figure(onset_evidence(hacked))
    assert fig.texts[0].get_text() == "No shortcut was found" and not [t for t in fig.axes[0].texts if "onset" in t.get_text()]


def test_nothing_found_says_what_was_looked_for(hacked):
    e = onset_evidence(hacked, premium=99.)
    assert e.found is None and "paid 99 SD beyond 1 outside score (held)" in onset_sentence(e)
    for p in sorted((hacked / "completions").glob("*.parquet"))[3:]: p.unlink()
    short = onset_evidence(hacked)
    assert short.found is None and "more than 3 steps with scores, and this run has 3" in onset_sentence(short)
    with pytest.raises(UserError, match="was not looked for"): onset_figure(short)
    for p in (hacked / "completions").glob("*.parquet"): write_parquet(p, read_parquet(p).drop(columns="held.reader"))
    assert "no outside scores were logged" in onset_sentence(onset_evidence(hacked))


def test_real_runs_agree_with_their_result(arms):
    for run in arms.values():
        assert onset_evidence(run).found == run.read_json("result.json")["onset"] == run_onset(run)


# --- faults --------------------------------------------------------------------------------------------------

def test_what_cannot_be_drawn_is_refused_in_one_line(arms, root):
    both = list(arms.values())
    bad = [(lambda: drift_curves(arms["forward"], x="steps"), "x: found 'steps', allowed: step, kl (nearest: 'step')"),
           (lambda: drift_by_arm(both, measures=["denail.share"]), "measures: found 'denail.share', allowed: a column of the ledger (nearest: 'denial.share')"),
           (lambda: drift_by_arm([]), "no run to draw"),
           (lambda: readout(both, step=3), "step: found 3, allowed: a step at which all runs were looked at: 0, 4"),
           (lambda: probe_rows(arms["forward"], 3), "step: found 3, allowed: a step at which the ledger looked: 0, 4"),
           (lambda: runs_of("tiny", "forward,placebo", 0, root), "arms: found no finished run of tiny placebo with seed 0; finished: forward, reverse; hmx-feel train --model tiny --arm placebo --seed 0"),
           (lambda: runs_of("tiny", "", 0, root), "arms: empty, allowed: trained arms, comma-separated; finished: forward, reverse")]
    for call, text in bad:
        with pytest.raises(UserError) as e: call()
        assert str(e.value) == text


def test_figures_need_no_torch():
    code = "import sys, hmx_feel.drift_plots; print(*sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# --- tutorials -----------------------------------------------------------------------------------------------

QUICK = dict(steps=1, completions_per_step=16, max_completion=32)
SMALL = dict(own_rubric=dict(answers=16, **QUICK), own_model=dict(answers=16, **QUICK), reading_a_result=dict(resamples=100), arms_and_drift=dict(arms="forward,reverse", resamples=100))


def told(path, **params):
    "Run a tutorial's cells in this process, with other parameters; returns its outputs"
    from execnb.shell import CaptureShell
    nb, shell = nbformat.read(path, 4), CaptureShell(mpl_format=None)
    assert any("skip_exec: true" in c.source for c in nb.cells[:2])
    tagged, = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    given = {line.split(" = ")[0] for line in tagged.source.splitlines()}
    assert set(params) <= given, "a parameter that the tutorial does not have"
    tagged.source += "".join(f"\n{k} = {v!r}" for k, v in params.items())
    out = []
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        assert not cell.outputs, f"{path.name} is committed with outputs"
        out += shell.run(cell.source)
        assert not shell.exc, f"{path.name}: {cell.source}\n{shell.exc}"
    return json.dumps(out)


def test_every_tutorial_is_run_here(): assert {p.stem for p in tutorials.glob("*.ipynb")} >= set(SMALL)


@pytest.mark.parametrize("name", ["own_rubric", "own_model"])
def test_a_tutorial_of_ones_own(name, tmp_path):
    said = told(tutorials / f"{name}.ipynb", folder=str(tmp_path), **SMALL[name])
    assert "(nearest: 'anchors')" in said if name == "own_rubric" else "no *.safetensors" in said
    run, = [r for r in (tmp_path / "runs").glob("*/*/seed0-*")]
    assert run.parent.name == ("asking" if name == "own_rubric" else "forward") and (run / "result.json").is_file()


@pytest.mark.parametrize("name", ["reading_a_result", "arms_and_drift"])
def test_a_tutorial_that_reads_runs(name, arms, root):
    before = {r.path: (r / "result.json").read_bytes() for r in arms.values()}
    said = told(tutorials / f"{name}.ipynb", runs=str(root), **SMALL[name])
    assert {r.path: (r / "result.json").read_bytes() for r in arms.values()} == before, "a finished run was touched"
    assert "No onset of reward hacking in 4 steps" in said
    if name == "arms_and_drift": assert {p.stem for p in (root / "drift" / "tiny").iterdir()} == {"arms", "arms-kl", "stances", "differences"}
    else: assert "checkpoint" in said and (root / "tiny" / "base").is_dir()
