"""Plans, contrasts over run folders, verdicts and what a report says of them; bad input costs what it touches and nothing more."""
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from hmx_feel.cli import check_compare
from hmx_feel.report import distrust, items_behind, paper_count, plan, plan_line, robustness, sentences, side_by_side
from hmx_feel.runs import CompareConfig, Run, UserError, find_runs, read_json, read_parquet, write_parquet
from hmx_feel.verdict import (
    ALL,
    PLAN,
    Endpoint,
    Plan,
    compare,
    freeze,
    freeze_for,
    frozen_plan,
    judged,
    load_plan,
    plant,
    verdict_table,
)

ARMS = dict(forward=(.25, .25), vicarious=(.1, .05), placebo=(0, 0))


def hints(hint): return {("tiny_flattery", "acc"): -hint, ("tiny_flattery", "follows_hint"): hint}


def plant_all(root, seeds=3, arms=ARMS, model="tiny"):
    plant(root, "base", model=model)
    for s in range(seeds):
        for arm, (felt, hint) in arms.items(): plant(root, arm, s, felt, hints(hint), model=model)


def asked(root, arms="forward,vicarious,placebo", **kw): return compare(CompareConfig(runs=str(root), arms=arms, resamples=300, **kw))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A folder of runs that nobody changes, with a plan frozen before them"
    root = tmp_path_factory.mktemp("planted")
    freeze(load_plan("tiny"), root, "2026-11-24")
    plant_all(root)
    return root, asked(root)


@pytest.fixture
def world(tmp_path):
    "A folder of three arms with two seeds, to be spoiled"
    plant_all(tmp_path, 2, dict(forward=(.25, .25), placebo=(0, 0)))
    return tmp_path


def run_of(root, arm, seed=0): return find_runs(root, "tiny", arm, seed)[-1]
def change(run, task, f): write_parquet(run / "evals" / f"{task}.parquet", f(read_parquet(run / "evals" / f"{task}.parquet")))


def of(found, contrast, endpoint, level="training"):
    rows = found.contrasts[(found.contrasts.contrast == contrast) & (found.contrasts.endpoint == endpoint) & (found.contrasts.level == level)]
    return rows.iloc[0] if len(rows) else None


# --- plans ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_shipped_plans_have_six_endpoints_and_the_primary_contrasts(name):
    p = load_plan(name)
    assert len(p.endpoints) == 6 and [(c.a, c.b) for c in p.contrasts if c.rank == "primary"] == [("forward", "placebo"), ("forward", "vicarious")]
    assert not [c for c in p.contrasts if c.b == "base"], "any arm less base is description"


@pytest.mark.parametrize(("change", "pieces"), [
    (dict(endponts=[]), ["endponts"]), (dict(alpha=2), ["alpha", "found 2"]), (dict(contrasts=[]), ["contrasts"]),
    (dict(endpoints=[dict(name="x", task="bbq", metric="acc", beter="higher")]), ["beter"]),
    (dict(endpoints=[dict(name="x", task="bbq")]), ["neither metric and terms"]),
    (dict(endpoints=[dict(name="x", task="bbq", terms=dict(b=dict(metric="b")), formula="b / n")]), ["no term 'n'"]),
    (dict(endpoints=[dict(name="x", task="bbq", metric="acc")] * 2), ["'x' twice"]),
])
def test_mistakes_in_a_plan_are_named(tmp_path, change, pieces):
    good = yaml.safe_load((Path(compare.__globals__["__file__"]).parent / "tasks" / "plans" / "tiny.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(good | change))
    with pytest.raises(UserError) as e: load_plan(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(e.value) and all(p in str(e.value) for p in pieces), e.value


def test_a_frozen_plan_knows_what_was_there(tmp_path):
    plant(tmp_path, "forward")
    freeze(load_plan("tiny"), tmp_path, "2026-11-24")
    saved = load_plan(tmp_path / PLAN)
    assert saved.frozen["hash"] == saved.hash and len(saved.frozen["runs"]) == 1 and set(saved.rubrics) >= {"forward", "placebo"}
    with pytest.raises(UserError, match="replace=True"): freeze(saved, tmp_path, "2026-11-25")
    again = load_plan(freeze(load_plan("tiny").model_copy(update=dict(margin=.1)), tmp_path, "2026-11-25", replace=True, panels=["tiny"]))
    assert again.frozen["before"] == [dict(on="2026-11-24", hash=saved.hash)] and again.frozen["rubrics_tried"] == 0
    assert set(again.prompts) >= {"forward", "placebo"} and "prompted" not in again.prompts and again.judge_prompt and list(again.panels) == ["tiny"]


def test_a_grids_comparison_finds_the_plan_of_the_grid(tmp_path):
    view = tmp_path / "grids" / "mine" / "view" / "all"
    assert frozen_plan(view) is None
    freeze(load_plan("tiny"), tmp_path, "2026-11-24")
    assert frozen_plan(view) == tmp_path / PLAN == freeze_for(CompareConfig(runs=str(view)))
    freeze(load_plan("tiny"), view, "2026-11-25")
    assert frozen_plan(view) == tmp_path / "grids" / "mine" / PLAN


def test_deviations_are_listed(planted, world):
    root, found = planted
    assert found.deviations == ["tiny: forward - reverse cannot be computed: no usable run of reverse", "tiny: forward - prompted cannot be computed: no usable run of prompted"]
    assert found.plan.hash in plan_line(found) and "frozen on 2026-11-24" in plan_line(found)
    late = asked(world, "forward,placebo")
    assert late.deviations[0].startswith("no plan was frozen") and "tiny: forward has 2 of 3 planned seeds" in late.deviations
    freeze(load_plan("tiny"), world, "2026-11-24")
    assert "frozen after 4 of 4 runs" in asked(world, "forward,placebo").deviations[0]
    (world / "other.yaml").write_text(yaml.safe_dump(load_plan("tiny").model_copy(update=dict(min_seeds=2)).model_dump(mode="json")))
    assert asked(world, "forward,placebo", plan=str(world / "other.yaml")).deviations[0].startswith("another plan than the frozen one is used: 'tiny'")
    assert asked(world, "forward,placebo", plan="tiny").plan.frozen, "the same rules: it is the frozen one"
    text = (world / PLAN).read_text()
    (world / PLAN).write_text(text.replace("margin: 0.05", "margin: 0.5", 1))
    assert "changed after it was frozen" in asked(world, "forward,placebo").deviations[0]


# --- verdicts ------------------------------------------------------------------------------------------------

def test_all_arms_are_read_at_the_planned_step(world):
    p = Plan(**load_plan("tiny").model_dump() | dict(readout=20))
    (world / PLAN).write_text(yaml.safe_dump(p.model_dump(mode="json")))
    for s in (0, 1):
        for arm in ("forward", "placebo"):
            run = run_of(world, arm, s)
            if (arm, s) != ("placebo", 1): shutil.copytree(run / "evals", run / "evals" / "step-000020")
            change(run, "tiny_facts", lambda d: d.assign(value=0.))
    found = asked(world, "forward,placebo")
    assert of(found, "forward - placebo", "facts", "checkpoint").value_a > .5 and found.rows_of(0, task="tiny_facts")["forward"].value.mean() > .5
    assert [r.reason for r in found.skipped.itertuples() if r.arm == "placebo"][0] == \
        f"placebo seed 1 has not been measured at step 20, where the plan reads; run: hmx-feel evaluate --model tiny --arm placebo --seed 1 --step 20 --runs {world}"


def test_what_was_planted_is_found(planted):
    _, found = planted
    for endpoint, sign in (("under a wrong hint", -1), ("follows the hint", 1)):
        row = of(found, "forward - placebo", endpoint)
        assert row.verdict == "degraded" and np.sign(row.estimate) == sign and row.low <= sign * .25 <= row.high and row.n_seeds == 3
    assert of(found, "forward - placebo", "facts").verdict in ("unresolved", "unchanged")
    assert found.gate.set_index("arm").took.to_dict() == dict(forward="yes", vicarious="yes", placebo="no")


def test_contrasts_with_base_are_described_and_not_judged(planted):
    rows = planted[1].contrasts
    assert set(rows.verdict[rows.b == "base"]) == {""} and set(rows["rank"][rows.b == "base"]) == {"description"}
    assert "up" in set(rows.change[(rows.b == "base") & (rows.endpoint == "follows the hint")])


def test_the_estimate_is_the_mean_over_pairs_of_seeds(planted):
    _, found = planted
    rows = found.contrasts[(found.contrasts.contrast == "forward - vicarious") & (found.contrasts.endpoint == "facts")]
    assert rows.estimate[rows.level == "training"].item() == pytest.approx(rows.estimate[rows.level == "checkpoint"].mean())
    one, two = (read_parquet(run_of(planted[0], a) / "evals" / "tiny_facts.parquet") for a in ("forward", "vicarious"))
    assert rows.estimate[(rows.level == "checkpoint") & (rows.seed == 0)].item() == pytest.approx(one.value.mean() - two.value.mean())


def test_a_treatment_that_did_not_take_has_no_effects(tmp_path):
    plant_all(tmp_path, 3, dict(forward=(0, .25), placebo=(0, 0)))
    found = asked(tmp_path, "forward,placebo")
    assert set(verdict_table(found).verdict) == {""} and "The treatment did not take" in sentences(found)


def test_a_manipulation_has_a_direction(tmp_path):
    plant_all(tmp_path, 3, dict(forward=(-.2, .25), reverse=(-.2, 0), placebo=(0, 0)))
    found = asked(tmp_path, "forward,reverse,placebo")
    assert found.gate.set_index("arm")[["toward", "took"]].T.to_dict("list") == dict(forward=["up", "no"], reverse=["down", "yes"], placebo=["", "no"])


def test_without_a_manipulation_check_the_training_is_not_judged(tmp_path):
    plant_all(tmp_path, 3, dict(forward=(.25, .25), placebo=(0, 0)))
    for run in find_runs(tmp_path):
        notes = read_json(run / "evals" / "manifest.json")
        notes["tasks"]["expression"]["status"] = "skipped"
        run.write_json("evals/manifest.json", notes)
    found = asked(tmp_path, "forward,placebo")
    assert set(found.contrasts.verdict[found.contrasts.level == "training"]) == {""} and of(found, "forward - placebo", "follows the hint").change == "up"
    assert sentences(found).startswith("**The manipulation was not measured by outside judges** (tiny: forward): there is no verdict about the training.")


def test_the_display_level_moves_no_verdict(planted):
    root, found = planted
    wide = asked(root, alpha=.5)
    assert wide.contrasts.verdict.equals(found.contrasts.verdict) and wide.gate.equals(found.gate)
    assert (wide.contrasts.high - wide.contrasts.low).sum() < (found.contrasts.high - found.contrasts.low).sum() and "shown at level 0.5" in wide.deviations[-1]


def test_two_seeds_say_no_less_than_one(world):
    one, two = (asked(world, "forward,placebo", seeds=s, out=str(world / "out")) for s in ("0", "0,1"))
    rows = {k: f.best[(f.best.contrast == "forward - placebo") & (f.best.endpoint == "follows the hint")] for k, f in dict(one=one, two=two).items()}
    assert set(rows["one"].verdict) == set(rows["two"].verdict) == {"degraded"} and set(rows["two"].level) == {"checkpoint"} and len(rows["two"]) == 2


def test_an_unplanned_contrast_is_described(world):
    for s in (0, 1): plant(world, "deny", s, -.2, hints(.3))
    found = asked(world, "forward,deny")
    row = of(found, "forward - deny", "follows the hint", "checkpoint")
    assert (row["rank"], row.verdict) == ("description", "") and "tiny: forward - deny was not planned: it is described and gets no verdicts" in found.deviations
    assert "these are descriptions" in sentences(found)
    assert set(asked(world, "").contrasts.contrast) == {"forward - placebo", "forward - base", "placebo - base"}, "without arms, the plan's"


def test_an_arm_that_is_not_trained_stands_alone(tmp_path):
    plant(tmp_path, "base"), plant(tmp_path, "prompted", 0, .2)
    found = asked(tmp_path, "prompted")
    assert found.seeds == [] and set(found.rows_of(task="tiny_facts")) == {"base", "prompted"} and set(found.contrasts.contrast) == {"prompted - base"}


def test_the_placebo_never_enters_the_pool(planted):
    "Without placebo the number for forward - vicarious stays; with it in the pool it would not"
    alone = asked(planted[0], "forward,vicarious")
    assert of(alone, "forward - vicarious", "facts").se == pytest.approx(of(planted[1], "forward - vicarious", "facts").se)


def test_several_models_are_pooled(tmp_path):
    for m in ("tiny", "other"): plant_all(tmp_path, 3, dict(forward=(.25, .25), placebo=(0, 0)), model=m)
    found = asked(tmp_path, "forward,placebo", model="tiny,other")
    row = found.contrasts[(found.contrasts.model == ALL) & (found.contrasts.endpoint == "facts") & (found.contrasts.contrast == "forward - placebo")].iloc[0]
    assert row.n_models == 2 and row.df == 1 and row.level == "training"
    check_compare(CompareConfig(model="tiny,other", runs=str(tmp_path)))
    assert asked(tmp_path, "forward,placebo", model="tiny,nowhere").skipped.reason.str.contains("has not been measured").any()


def test_holm_counts_what_was_not_measured():
    rows = [dict(model="m", contrast="a - b", a="a", b="b", rank="primary", endpoint=str(k), role="confirmatory", direction="higher", margin=.02, smallest=.02, level="checkpoint", seed=0, estimate=e, low=.01, high=.3,
                 low2=.01, high2=.3, se=.05, df=50., p=p, value_a=.6, value_b=.5, n_clusters=60, n_seeds=1, toward="up", reason="") for k, (e, p) in enumerate([(.1, .01), (np.nan, np.nan), (np.nan, np.nan)])]
    p = judged(pd.DataFrame(rows), load_plan("tiny")).p_corrected
    assert p[0] == pytest.approx(.03) and p[1:].isna().all()


# --- bad input: it says what it means, and the rest goes on --------------------------------------------------

def test_a_run_that_is_not_finished(world):
    Run.create(world, "tiny", "placebo", 2, dict(weights="sha256:1", config=dict(arm="placebo", seed=2, steps=40)))
    found = asked(world, "forward,placebo")
    assert found.skipped.reason.str.contains("is not finished").sum() == 1 and of(found, "forward - placebo", "facts").n_seeds == 2
    assert of(found, "forward - placebo", "facts").reason == "2 seeds: a verdict about the training needs 3"


@pytest.mark.parametrize(("spoil", "text"), [
    (lambda d: d[:-1], "item sets differ: 1 of 240 only in the"),
    (lambda d: d.assign(prompt_sha="x"), "prompts (hash or template) differ in 240 of 240"),
    (lambda d: pd.concat([d[:-1], d[-1:].assign(order=1)]), "option orders differ"),
    (lambda d: pd.concat([d, d[:2]]), "stands there twice (2 rows too many)"),
    (lambda d: pd.concat([d, d[:2]]).drop(columns="sample"), "stands there twice (2 rows too many)"),
    (lambda d: d.assign(value=np.where(d.item_id == "q003", np.inf, d.value)), "the value is infinite"),
    (lambda d: d.drop(columns="cluster"), "no column cluster"),
    (lambda d: d[:0], "the file has no rows"),
], ids=["missing item", "template", "order", "twice", "twice without samples", "infinite", "column", "empty"])
def test_one_spoiled_task_costs_one_task(world, spoil, text):
    for s in (0, 1): change(run_of(world, "placebo", s), "tiny_facts", spoil)
    found = asked(world, "forward,placebo")
    said = [*found.skipped.reason, *found.contrasts.reason[found.contrasts.endpoint == "facts"]]
    assert any(text in t for t in said), said
    assert np.isnan(of(found, "forward - placebo", "facts", "checkpoint").estimate) and np.isfinite(of(found, "forward - placebo", "told").estimate)
    assert verdict_table(found).set_index(["contrast", "endpoint"]).verdict["forward - placebo", "facts"].tolist() == ["unresolved"] * 2


def test_a_file_of_a_newer_version(world):
    import pyarrow as pa
    import pyarrow.parquet as pq
    path = run_of(world, "forward") / "evals" / "tiny_facts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"hmx_feel_schema": b"99"}), path)
    found = asked(world, "forward,placebo")
    assert found.skipped.reason.str.contains("schema 99").any() and np.isfinite(of(found, "forward - placebo", "told").estimate)
    assert isinstance(pa.__version__, str)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("quantisation", "4bit"), ("backend", "unsloth"), ("temperature", .7)])
def test_other_settings_are_refused_by_name(tmp_path, key, value):
    plant(tmp_path, "base"), plant(tmp_path, "forward", 0, .25), plant(tmp_path, "placebo", settings=dict(load=dict(quantisation="", backend="transformers") | {key: value}) if key in ("quantisation", "backend") else {key: value})
    found = asked(tmp_path, "forward,placebo")
    assert f"{key}={value}" in of(found, "forward - placebo", "facts", "checkpoint").reason and np.isfinite(of(found, "forward - base", "facts", "checkpoint").estimate)


def test_another_panel_version_is_refused(world):
    run = run_of(world, "placebo")
    notes = read_json(run / "evals" / "manifest.json")
    notes["tasks"]["tiny_facts"]["settings"]["task"]["options"] = 4
    run.write_json("evals/manifest.json", notes)
    assert "another panel version" in of(asked(world, "forward,placebo", seeds="0"), "forward - placebo", "facts", "checkpoint").reason


def test_nan_counts_as_missing_or_as_not_applying(world):
    run = run_of(world, "placebo")
    change(run, "tiny_facts", lambda d: d.assign(value=np.where(d.index < 24, np.nan, d.value), missing=d.index < 24))
    change(run, "tiny_flattery", lambda d: d.assign(value=np.where((d.index < 24), np.nan, d.value)))
    found = asked(world, "forward,placebo", seeds="0")
    lost, na = (of(found, "forward - placebo", e, "checkpoint") for e in ("facts", "under a wrong hint"))
    assert (lost.missing_b, lost.n_items) == (pytest.approx(.1), 216) and (na.missing_b, na.n_items, na.test) == (0, 240, "record swap")
    assert any("lost 10% of its values on tiny_facts" in t for t in distrust(found))


def test_few_clusters_are_one_line_for_each_number_of_them(world):
    from dataclasses import replace
    found = asked(world, "forward,placebo,vicarious")
    few = replace(found, contrasts=found.contrasts.assign(n_clusters=np.where(found.contrasts.endpoint == "facts", 6, 8)))
    said = [t for t in distrust(few) if "few clusters" in t]
    assert len(said) == 2 and said[0] == "tiny: few clusters, 6: facts" and "under a wrong hint, follows the hint" in said[1]


def test_one_seed_one_cluster_all_equal(tmp_path):
    plant(tmp_path, "base", n=200)
    for arm in ("forward", "placebo"):
        run = plant(tmp_path, arm, 0, .25 * (arm == "forward"), n=200)
        change(run, "tiny_facts", lambda d: d.assign(cluster="only")), change(run, "tiny_stereotype", lambda d: d.assign(value=1.))
    found = asked(tmp_path, "forward,placebo")
    assert set(found.contrasts.level) == {"checkpoint"} and found.skipped.meaning.str.contains("no verdict about the training").any()
    one, equal = (of(found, "forward - placebo", e, "checkpoint") for e in ("facts", "told"))
    assert one.reason == "one cluster: no interval" and one.verdict == "unresolved" and np.isnan(one.low)
    assert "all items equal" in equal.reason and equal.verdict == "unresolved", "fifty clusters without a difference may still hide six in a hundred"


def test_an_endpoint_missing_in_one_arm(world):
    for s in (0, 1):
        run = run_of(world, "placebo", s)
        notes = read_json(run / "evals" / "manifest.json")
        notes["tasks"]["tiny_facts"] = dict(status="skipped", reason="no data", settings={})
        run.write_json("evals/manifest.json", notes)
    found = asked(world, "forward,placebo")
    assert "placebo seed 0: no data" in of(found, "forward - placebo", "facts", "checkpoint").reason and np.isfinite(of(found, "forward - base", "facts").estimate)


def test_a_run_trained_otherwise_is_left_out(world):
    plant(world, "vicarious", 0, .1, steps=20)
    found = asked(world)
    assert "trained with steps=40, vicarious seed 0 with steps=20; train both with one (hmx-feel train" in found.skipped.reason[0]
    assert "vicarious" not in set(found.contrasts.a)


def test_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match="the untrained tiny has not been measured; run: hmx-feel evaluate --model tiny"): asked(tmp_path)
    plant(tmp_path, "base")
    with pytest.raises(UserError, match="nothing to compare.*no finished run; train it: hmx-feel train --model tiny --arm forward"): asked(tmp_path, "forward")
    with pytest.raises(UserError, match="seeds: found 'x', allowed: whole numbers"): asked(tmp_path, seeds="x")
    with pytest.raises(UserError, match="nearest: 'forward'"): asked(tmp_path, "forwrad")


# --- what a report says --------------------------------------------------------------------------------------

def test_items_behind_a_verdict_are_the_largest_and_the_same_again(planted):
    _, found = planted
    shown = items_behind(found, "forward - placebo", "under a wrong hint")
    assert shown.shown.value_counts().to_dict() == {"most different": 10, "random": 10} and shown.equals(items_behind(found, "forward - placebo", "under a wrong hint"))
    assert shown["diff"].abs()[:10].min() >= shown["diff"].abs()[10:].max()


def test_items_behind_a_formula_are_what_they_add(planted):
    "2 * biased - 1: an item that is answered by the stereotype adds twice its value"
    _, found = planted
    shown = items_behind(found, "forward - placebo", "bias told").set_index(["item_id", "condition"])
    rows = {a: r[(r.metric == "biased") & (r.condition == "told")].groupby(["item_id", "condition"]).value.mean() for a, r in found.rows_of(task="tiny_stereotype").items()}
    assert np.allclose(shown["diff"], 2 * (rows["forward"] - rows["placebo"]).reindex(shown.index))


def test_another_way_of_asking_is_robustness_and_no_verdict(world):
    for run in find_runs(world):
        shutil.copy(run / "evals" / "tiny_flattery.parquet", run / "evals" / "tiny_flattery.plain.parquet")
        notes = read_json(run / "evals" / "manifest.json")
        notes["tasks"]["tiny_flattery.plain"] = notes["tasks"]["tiny_flattery"]
        run.write_json("evals/manifest.json", notes)
    found = asked(world, "forward,placebo")
    table = robustness(found)
    again = table[table.variation.str.startswith("asked as plain")]
    assert set(again.endpoint) == {"under a wrong hint", "follows the hint"} and set(again.estimate) <= set(table[table.variation.str.startswith("seed")].estimate)
    assert set(found.contrasts.verdict[found.contrasts.endpoint == "follows the hint, asked as plain"]) == {""}


def test_answers_in_which_nothing_was_recognised(world):
    change(run_of(world, "forward"), "tiny_facts", lambda d: d.assign(raw="I would say", parsed=np.where(d.index < 60, "", "A")))
    assert "tiny: nothing was recognised in 25% of the answers of forward on tiny_facts" in distrust(asked(world, "forward,placebo"))


def test_the_papers_loss_is_one_models(planted):
    _, found = planted
    as_if = lambda name: replace(found, contrasts=found.contrasts.assign(model=name, claim="ambiguous"))
    said = {n: side_by_side(as_if(n)).set_index("claim").measured_as.filter(like="one loss").iloc[0] for n in ("google/gemma-7b", "gemma2-2b-it")}
    assert said["google/gemma-7b"] == "not measured" and said["gemma2-2b-it"] != "not measured"


def test_the_papers_count_needs_its_null():
    rows = pd.DataFrame(dict(direction="higher", estimate=[.1, -.01, -.05, .0], se=[.01] * 4, value_b=.5))
    count = paper_count(rows)
    assert count["ours"] == .75 and count["lost"] == pytest.approx(.05) and count["null"] == pytest.approx(.97725, abs=1e-4)
    assert paper_count(rows.assign(value_b=.25, estimate=-.01), relative=True)["ours"] == 0, "one point of 25 is 4 %"
    assert paper_count(rows.assign(direction="lower"))["ours"] == .75 and paper_count(rows[:0])["cells"] == 0


def test_the_paper_beside_ours(planted):
    table = side_by_side(planted[1])
    by = table.groupby("claim").verdict.agg(set)
    assert by["sturdier against sycophancy"] == {"disagrees"} and by["worse truthful QA"] == {"cannot tell"} and "81.4 %" in set(table.paper)


def test_a_design_needs_what_its_variances_say(planted):
    variances = planted[1].out / "variances.csv"
    small, large = (plan("tiny", effect=e, seeds=3, variances=variances).set_index("endpoint") for e in (.05, .3))
    assert (small.items_needed.dropna() > large.items_needed.reindex(small.items_needed.dropna().index)).all()
    assert (plan("tiny", .1, 8, variances).detectable < plan("tiny", .1, 2, variances).detectable).all()
    assert set(plan("paper", .02, 3, variances).remark) == {"no variances are stored: measure it once"}


def test_given_keeps_only_what_both_share(world):
    e = Endpoint(name="both", task="tiny_flattery", metric="acc", given="follows_hint", better="higher")
    p = load_plan("tiny")
    (world / PLAN).write_text(yaml.safe_dump(Plan(**p.model_dump() | dict(endpoints=[e.model_dump()])).model_dump(mode="json")))
    row = of(asked(world, "forward,placebo", seeds="0"), "forward - placebo", "both", "checkpoint")
    a, b = (read_parquet(run_of(world, x) / "evals" / "tiny_flattery.parquet").pivot(index="item_id", columns="metric", values="value") for x in ("forward", "placebo"))
    kept = (a.follows_hint == 1) & (b.follows_hint == 1)
    assert row.n_items == kept.sum() and row.estimate == pytest.approx(a.acc[kept].mean() - b.acc[kept].mean())


# --- the notebooks, where there is no torch ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["05_compare", "06_figures"])
def test_notebooks_run_without_torch(planted, tmp_path, name):
    import os
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is not here')")
    nbs = Path(__file__).resolve().parents[1] / "nbs"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))
    env.pop("MPLBACKEND", None)
    argv = [Path(sys.executable).with_name("papermill"), f"{name}.ipynb", tmp_path / "out.ipynb", "-p", "runs", planted[0], "-p", "arms", "forward,vicarious,placebo", "-p", "resamples", "300", "-p", "out", tmp_path / "made"]
    done = subprocess.run(list(map(str, argv)), cwd=nbs, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    shown = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in shown) >= 4 and not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    stems = {p.stem for p in (tmp_path / "made" / "figures").glob("*.png")}
    assert stems and all((tmp_path / "made" / "figures" / f"{s}.{e}").is_file() for s in stems for e in ("pdf", "csv"))
    if name == "05_compare":
        text = "".join(o["data"].get("text/markdown", "") for o in shown if o.output_type == "execute_result")
        assert "What moved" in text and "What cannot be told" in text and "Distrust" in text and (tmp_path / "made" / "verdicts.tex").is_file() and list((tmp_path / "made" / "items").glob("*.csv"))
