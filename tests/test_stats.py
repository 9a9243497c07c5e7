"""Statistics against other packages, and comparisons over run folders: what takes too long or too much room for a cell."""
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as sps

from hmx_feel.runs import CompareConfig, Run, UserError, write_parquet
from hmx_feel.stats import cluster_interval, compare, contrast_table, holm, item_values, paired, sign_flip, summary, verdicts

# --- tests and intervals -------------------------------------------------------------------------------------

CLUSTER = np.repeat(np.arange(30), np.arange(30) % 4 + 1)   # thirty uneven clusters


@pytest.fixture
def values():
    rng = np.random.default_rng(5)
    return rng.normal(0, 1, 30)[CLUSTER] + rng.normal(.3, 1, len(CLUSTER))


def test_drawn_patterns_come_close_to_the_listed_ones():
    noise = np.random.default_rng(3).normal(.12, 1, 12)
    exact, drawn, again = (sign_flip(noise, range(12), resamples=r) for r in (4_096, 4_000, 4_000))
    assert drawn == pytest.approx(exact, abs=.02) and drawn == again
    assert sign_flip(np.zeros(30), range(30)) == 1
    assert np.isnan(sign_flip([.3, .4, .5], ["only"] * 3)), "whatever happened in one cluster happened once"


def test_sign_flip_keeps_its_promise():
    "400 comparisons without any effect: about 5 % fall below 0.05"
    rng = np.random.default_rng(11)
    null = [sign_flip(rng.normal(0, 1, 30)[CLUSTER] + rng.normal(0, 1, len(CLUSTER)), CLUSTER, resamples=400, seed=s) for s in range(400)]
    assert .03 <= np.mean(np.array(null) < .05) <= .07


def test_error_is_that_of_statsmodels(values):
    "The cluster-robust error of a regression on a constant"
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds=dict(groups=CLUSTER))
    assert cluster_interval(values, CLUSTER).se == pytest.approx(fit.bse[0])


def test_interval_is_that_of_scipy(values):
    mine = cluster_interval(values, range(len(values)))
    theirs = sps.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose([mine.low, mine.high], [*theirs], atol=.02)


def test_strata_keep_the_mix_fixed(values):
    category = np.where(CLUSTER < 15, "age", "race")
    shifted = values + 3 * (category == "age")
    assert cluster_interval(shifted, CLUSTER, strata=category).se < .8 * cluster_interval(shifted, CLUSTER).se
    with pytest.raises(UserError, match="more than one stratum"): cluster_interval(values, CLUSTER, strata=np.arange(len(values)))


def test_no_tests_no_correction(): assert len(holm([])) == 0


# --- pairs and contrasts -------------------------------------------------------------------------------------

def rows(run_id, value, task="expression", metric="rubric", family=3):
    "Made-up item rows, one per value"
    n = len(value)
    return pd.DataFrame(dict(run_id=run_id, task=task, item_id=[f"p{i:03d}" for i in range(n)], cluster=[f"c{i // family}" for i in range(n)],
                             condition="ask.feeling", order=0, prompt_sha=[f"{i:04x}" for i in range(n)], metric=metric, value=np.asarray(value, float),
                             raw="", parsed="", missing=False))


def said(run_id, gain, n=60):
    "Scores that differ from another run's by a gain that wobbles from item to item"
    rng = np.random.default_rng(0)
    return rows(run_id, rng.uniform(.3, .5, n) + gain + np.random.default_rng(len(run_id)).normal(0, .02, n))


def quiz(run_id, right, n=39): return rows(run_id, np.arange(n) < right, "quiz", "acc", family=1)


def test_the_order_of_the_rows_does_not_matter():
    a, b = said("forward-1", .2), said("base-1", 0)
    pd.testing.assert_frame_equal(paired(a.sample(frac=1, random_state=1), b, "expression", "rubric"), paired(a, b, "expression", "rubric"))


def test_what_cannot_be_paired():
    a, b = said("forward-1", .2), said("base-1", 0)
    with pytest.raises(UserError, match="no rows of expression mc2"): paired(a, b, "expression", "mc2")
    with pytest.raises(UserError, match="several runs"): paired(pd.concat([a, said("forward-2", .1)]), b, "expression", "rubric")
    with pytest.raises(UserError, match="number of samples differs in 60 of 60"): paired(pd.concat([a] * 4), b, "expression", "rubric")
    assert item_values(pd.concat([a, a])).samples.eq(2).all()


def test_a_contrast_more_or_less_leaves_the_others_as_they_were():
    arms = dict(base=said("base-1", 0), forward=said("forward-1", .2), reverse=said("reverse-01", -.1))
    both = contrast_table(arms, [("forward", "base"), ("base", "reverse")])
    pd.testing.assert_frame_equal(contrast_table(arms, [("base", "reverse")]), both[1:].reset_index(drop=True))


# --- comparisons ---------------------------------------------------------------------------------------------

PANEL = dict(expression=dict(relation="trained", metrics=dict(rubric="descriptive")), quiz=dict(relation="isolated", metrics=dict(acc="higher")))
SETTINGS = dict(steps=40, lr=1e-3, judge="base", min_mass=.5, dtype="auto", rubric="", micro_batch=64, revision="", trust_remote_code=False)


@pytest.fixture
def world(tmp_path):
    "A folder of made-up finished runs, and what compares them"
    class World:
        def run(self, arm, gain=0., right=30, seed=0, weights="sha256:1", dtype="float32", settings=None, **config):
            made = dict(source=weights) if arm == "base" else dict(weights=weights, dtype=dtype, config=dict(SETTINGS, arm=arm, seed=seed) | config)
            run = Run.create(tmp_path, "tiny", arm, seed, made)
            for t, part in dict(expression=said(f"{arm}-{seed}", gain), quiz=quiz(f"{arm}-{seed}", right)).items(): write_parquet(run / "evals" / f"{t}.parquet", part)
            notes = {t: dict(status="done", settings=dict(task=PANEL[t], samples=1, weights=weights) | (settings or {})) for t in PANEL}
            run.write_json("evals/manifest.json", dict(tasks=notes))
            return run.finish({})
        def compare(self, **kw): return compare(CompareConfig(runs=str(tmp_path), resamples=500, **kw))
    return World()


def test_what_is_missing_says_what_to_do(world):
    with pytest.raises(UserError, match="the untrained tiny has not been measured; run: hmx-feel evaluate --model tiny"): world.compare()
    world.run("base"), world.run("forward", .2)
    with pytest.raises(UserError, match="forward with seed 3"): world.compare(arms="forward", seeds="3")
    with pytest.raises(UserError, match="seeds: found 'x', allowed: whole numbers"): world.compare(seeds="x")
    with pytest.raises(UserError, match="arms: found 'base', allowed: trained arms"): world.compare(arms="base")
    bare = world.run("deny")
    (bare / "evals" / "manifest.json").unlink()
    with pytest.raises(UserError, match="deny seed 0 has not been measured; run: hmx-feel evaluate --model tiny .*--arm deny --seed 0"): world.compare(arms="deny")


@pytest.mark.parametrize(("field", "value"), [("steps", 2), ("lr", 1e-4), ("judge", "live"), ("min_mass", 0.), ("trust_remote_code", True)])
def test_arms_that_were_trained_differently_are_refused(world, field, value):
    world.run("base"), world.run("forward", .2), world.run("reverse", -.1, **{field: value})
    with pytest.raises(UserError) as e: world.compare()
    text, was = str(e.value), SETTINGS[field]
    assert f"forward seed 0 was trained with {field}={was}, reverse seed 0 with {field}={value}; train both with one (hmx-feel train " in text
    option = field.replace("_", "-")
    assert (f"--no-{option}" if was is False else f"--{option} {was}") in text and "--arm reverse" in text and text.endswith("--replace)")


def test_seeds_that_were_trained_differently_are_refused(world):
    world.run("base"), world.run("forward", .2), world.run("forward", .2, seed=1, steps=20)
    with pytest.raises(UserError, match="forward seed 0 was trained with steps=40, forward seed 1 with steps=20"): world.compare(arms="forward")
    assert world.compare(arms="forward", seeds="1").seeds == [1]


def test_other_weights_or_another_dtype_are_refused(world):
    world.run("base"), world.run("forward", .2), world.run("reverse", -.1, weights="sha256:2"), world.run("placebo", dtype="bfloat16")
    with pytest.raises(UserError, match="weights=sha256:1, reverse seed 0 with weights=sha256:2; train both on one revision or folder"): world.compare()
    with pytest.raises(UserError, match="dtype=float32, placebo seed 0 with dtype=bfloat16"): world.compare(arms="forward,placebo")
    with pytest.raises(UserError, match="reverse seed 0 was measured with weights=sha256:2, the untrained model with weights=sha256:1"): world.compare(arms="reverse")


def test_what_may_differ(world):
    "The arm, its rubric, the seed, and how a step is cut into batches"
    world.run("base"), world.run("forward", .2), world.run("vicarious", .1, rubric="hmx-vicarious", micro_batch=8, revision="main", seed=0)
    assert set(world.compare(arms="forward,vicarious").contrasts.contrast) == {"forward - base", "vicarious - base", "forward - vicarious"}


def test_seeds_are_not_averaged(world):
    world.run("base"), world.run("forward", .2, 21), world.run("reverse", -.1)
    one = world.compare()
    world.run("forward", .15, 24, seed=1)
    two = world.compare()
    assert two.contrasts.groupby("seed").size().to_dict() == {0: 6, 1: 2} and two.skipped.reason.tolist()[-1] == "no finished run with this seed"
    pd.testing.assert_frame_equal(two.contrasts[two.contrasts.seed == 0].reset_index(drop=True), one.contrasts)
    with pytest.raises(UserError, match="give one run at a time"): summary(two.rows["forward"], by=("task", "metric"))


@pytest.mark.parametrize(("n", "word"), [(39, "unresolved"), (149, "unresolved"), (150, "unchanged"), (1000, "unchanged")])
def test_no_difference_on_few_items_is_no_certainty(n, word):
    "Rule of three: with none of n changed, up to 3/n may still change"
    head = contrast_table(dict(a=said("forward-1", .2), base=said("base-1", 0)), [("a", "base")])
    equal = contrast_table(dict(a=quiz("forward-1", 30, n), base=quiz("base-1", 30, n)), [("a", "base")], resamples=200)
    table = pd.concat([head.assign(direction="descriptive", role="gate"), equal.assign(direction="higher", role="exploratory")], ignore_index=True)
    out = verdicts(table.assign(seed=0, p_corrected=table.p))
    assert (out.low[1], out.high[1]) == (0, 0) and out.change[0] == "up" and out.verdict[1] == word
