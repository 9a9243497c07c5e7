"""Statistics against other packages, and comparisons over run folders: what takes too long or too much room for a cell."""
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as sps

from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests

from hmx_feel.runs import UserError
from hmx_feel.stats import (
    Cell,
    Formula,
    bh,
    cluster_interval,
    cluster_totals,
    contrast_table,
    detectable,
    generator,
    hartung_knapp,
    holm,
    influence,
    item_values,
    mcnemar_midp,
    paired,
    pooled_variance,
    resampled,
    robust_variance,
    seed_level,
    sign_flip,
    solve,
)

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


# --- formulas, shared resampling, whole records --------------------------------------------------------------

NONE = np.zeros(30, int)
MEAN, RATIO = Formula("x", ["x"]), Formula("top / bottom", ["top", "bottom"])


def totals(*values): return cluster_totals(np.array(values, float), CLUSTER, 30)


def test_the_worked_example_of_fagerland_and_others():
    "BMC Medical Research Methodology 13:91, 2013, table 1: 21 children, 1 against 7 changes"
    assert mcnemar_midp(1, 7) == pytest.approx(10 / 256, abs=1e-12) and round(mcnemar_midp(1, 7), 3) == .039


@pytest.mark.parametrize("text", ["x +", "x ** 2", "x.real", "print(x)", "y", "[x]", "'a'"])
def test_a_formula_is_arithmetic_and_nothing_else(text):
    with pytest.raises(UserError, match="formula"): Formula(text, ["x"])


def test_the_error_of_a_ratio_is_that_of_a_regression(values):
    "Delta method against the cluster-robust error of statsmodels' regression through the origin, both without small-sample factors apart from C / (C - 1)"
    bottom = np.abs(values) + 1
    top = values + 2
    cell = Cell(RATIO, totals(top, bottom), totals(top * 0, bottom), NONE, n_items=len(values))
    ratio, = solve([cell], resamples=200)
    residual = np.bincount(CLUSTER, top - ratio.estimate * bottom)
    assert ratio.se == pytest.approx(np.sqrt(30 / 29 * (residual ** 2).sum()) / bottom.sum(), abs=1e-9)
    wls = sm.WLS(top / bottom, np.ones(len(top)), weights=bottom).fit(cov_type="cluster", cov_kwds=dict(groups=CLUSTER, use_correction=False))
    assert ratio.se == pytest.approx(wls.bse[0] * np.sqrt(30 / 29), abs=1e-9)


def test_the_bootstrap_of_a_ratio_is_that_of_scipy(values):
    a, b = totals(values + 3, np.abs(values) + 1), totals(values * 0 + 2, np.abs(values) + 1.5)
    mine, = solve([Cell(RATIO, a, b, NONE, n_items=9)], resamples=10_000)
    def number(i): return RATIO(a[i].sum(0)) - RATIO(b[i].sum(0))
    theirs = sps.bootstrap((np.arange(30),), number, method="percentile", n_resamples=9999, vectorized=False, rng=1).confidence_interval
    np.testing.assert_allclose([mine.low, mine.high], [*theirs], atol=.04 * (mine.high - mine.low))


def test_the_swap_of_records_is_that_of_scipy():
    "Nine clusters, every swap listed"
    rng = np.random.default_rng(2)
    where = np.repeat(np.arange(9), 4)
    sides = [cluster_totals(rng.random((2, 36)) + [[0], [.5]] + [[shift], [0]], where, 9) for shift in (.35, 0)]
    mine, = solve([Cell(RATIO, *sides, np.zeros(9, int), n_items=36)])
    def number(x, y): return RATIO(np.array([a if k >= 0 else b for k, a, b in zip(x, *sides, strict=True)]).sum(0)) - RATIO(np.array([a if k < 0 else b for k, a, b in zip(x, *sides, strict=True)]).sum(0))
    theirs = sps.permutation_test((np.arange(1., 10), -np.arange(1., 10)), number, permutation_type="samples", n_resamples=np.inf, vectorized=False)
    assert mine.test == "record swap" and mine.p == pytest.approx(theirs.pvalue, abs=1e-6)


def test_cells_share_their_draws(values):
    "A cell's numbers do not depend on what stands beside it"
    one, two = (Cell(RATIO, totals(values + k, np.abs(values) + 1), totals(values, np.abs(values) + 2), NONE, n_items=9) for k in (3, 5))
    alone, = solve([one], resamples=300)
    beside, _ = solve([one, two], resamples=300)
    assert (alone.p, alone.low, alone.high) == pytest.approx((beside.p, beside.low, beside.high), rel=1e-5), "the sums are of single precision"


def test_strata_are_averaged_and_drawn_apart(values):
    strata = (np.arange(30) % 2).astype(int)
    cell = Cell(MEAN, totals(values + 5 * strata[CLUSTER]), totals(values * 0), strata, n_items=len(values))
    found, = solve([cell], resamples=2000)
    each = [values[strata[CLUSTER] == s].mean() + 5 * s for s in (0, 1)]
    assert found.estimate == pytest.approx(np.mean(each)) and found.df == 28
    drawn = resampled(cell.a.reshape(30, -1), strata, 2000, generator(0, "x"))
    assert drawn.shape == (2000, 2, 2) and found.high - found.low < 2 * 2.2 * found.se


def test_own_denominators():
    "10 right at first and 5 given up, against 20 and 2"
    a, b = np.full((2, 60), np.nan), np.full((2, 60), np.nan)
    a[0, :10], b[0, 20:40] = np.arange(10) < 5, np.arange(20) < 2
    sides = [cluster_totals(x[:1], np.arange(60), 60) for x in (a, b)]
    found, = solve([Cell(MEAN, *sides, np.zeros(60, int), n_items=30)], resamples=500)
    assert (found.value_a, found.value_b) == (.5, .1) and found.test == "record swap" and found.p < .05


def test_corrections_are_those_of_statsmodels():
    p = np.random.default_rng(8).random(40) ** 4
    for mine, method in ((holm, "holm"), (bh, "fdr_bh")): np.testing.assert_allclose(mine(p), multipletests(p, method=method)[1], atol=1e-12)


# --- levels --------------------------------------------------------------------------------------------------

def test_the_training_level_without_items_is_welch_and_student():
    a, b, still = np.array([.3, .5, .4, .45]), np.array([.1, .35, .2, .25]), np.zeros((4, 10))
    own = [(x.var(ddof=1), 3, 4) for x in (a, b)]
    assert seed_level(a - b, still, np.zeros(10, int), own).p == pytest.approx(sps.ttest_ind(a, b, equal_var=False).pvalue, abs=1e-9)
    v, df = pooled_variance([a, b])
    assert df == 6 and seed_level(a - b, still, np.zeros(10, int), [(v, df, 2)]).p == pytest.approx(sps.ttest_ind(a, b).pvalue, abs=1e-9)


def test_what_items_and_seeds_share_is_counted_once():
    "Runs that differ by item noise alone: both parts see it; the error of the mean over seeds is that of the averaged items"
    rng, C, S = np.random.default_rng(0), 200, 4
    se, true = [], []
    for _ in range(60):
        d = rng.normal(0, 1, (S, C))
        psi = (d - d.mean(1, keepdims=True)) / C
        level = seed_level(d.mean(1), psi, np.zeros(C, int), [(d.mean(1).var(ddof=1), S - 1, S)])
        se.append(level.se ** 2)
        true.append(robust_variance(psi.mean(0), np.zeros(C, int)))
    assert np.mean(true) == pytest.approx(1 / (S * C), rel=.1)
    assert 1 / (S * C) <= np.mean(se) < 1.6 / (S * C), "twice would be 2"


def test_one_seed_says_nothing_about_the_training():
    assert np.isnan(seed_level([.3], np.zeros((1, 9)), np.zeros(9, int), [(.1, 2, 3)]).p) and pooled_variance([[.3], [.1]])[1] == 0


def test_models_are_pooled_as_statsmodels_does_but_never_below_their_errors():
    y, s = np.array([.1, .4, .2, -.1, .3]), np.array([.05, .1, .04, .06, .1])
    theirs = combine_effects(y, s ** 2, method_re="dl", use_t=True)
    mine = hartung_knapp(y, s)
    assert mine["se"] == pytest.approx(np.sqrt(theirs.var_hksj_re), abs=1e-9) and mine["estimate"] == pytest.approx(theirs.mean_effect_re, abs=1e-9)
    assert [mine["low"], mine["high"]] == pytest.approx(list(theirs.conf_int(use_t=True)[3]), abs=1e-9)
    assert hartung_knapp([.1, .1, .1], [.2, .2, .2])["se"] == pytest.approx(.2 / np.sqrt(3)) and np.isnan(hartung_knapp([.1], [.2])["p"])


def test_power_is_what_it_says():
    from statsmodels.stats.power import NormalIndPower
    effect = detectable(1 / np.sqrt(50))
    assert NormalIndPower(ddof=0).power(effect, 50, .05, ratio=0) == pytest.approx(.8, abs=1e-4)


@pytest.mark.parametrize(("value", "reason"), [(np.zeros(30), "all items equal"), (np.full(30, np.nan), "no item has a value")])
def test_nothing_to_see_says_so(value, reason):
    sides = [cluster_totals(value[None], np.arange(30), 30), cluster_totals(np.zeros((1, 30)), np.arange(30), 30)]
    found, = solve([Cell(MEAN, *sides, NONE, n_items=int(np.isfinite(value).sum()))], resamples=100)
    assert reason in found.reason


def test_one_cluster_has_no_interval():
    sides = [cluster_totals(np.full((1, 5), v), np.zeros(5, int), 1) for v in (.5, .2)]
    found, = solve([Cell(MEAN, *sides, np.zeros(1, int), n_items=5)])
    assert found.estimate == pytest.approx(.3) and np.isnan(found.p) and found.reason == "one cluster: no interval"


def test_influences_sum_to_zero(values):
    assert influence(RATIO, totals(values + 3, np.abs(values) + 1), NONE).sum() == pytest.approx(0, abs=1e-12)
