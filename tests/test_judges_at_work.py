"The judges inside a real training: every identity, gated groups, observers that leave no mark"
import numpy as np
import pytest
from safetensors.torch import load_file

from hmx_feel.endpoint import add_up
from hmx_feel.exam import judge_identity
from hmx_feel.grpo import RubricReward, check_run, external_judge, gate, judge_warnings, known_judge, resolve, train
from hmx_feel.judge import judge_prompt
from hmx_feel.rubric import Rubric
from hmx_feel.runs import Run, TrainConfig, UserError, content_hash, read_parquet

SMALL = dict(steps=3, max_completion=64, probe_every=3, completions_per_step=16, save_every=3, max_missing=1.)


def calibrated(root, fit=True, layout="rubric_first", noise_floor=.5, model="tiny", rubric="hmx-feel", **which):
    "A calibration as `02_judge` leaves it"
    R = Rubric.load(rubric)
    run = Run.create(root, model, "judge", 0, judge_identity(model, **which) | dict(rubric=R.hash, judge_prompt=content_hash(judge_prompt())))
    run.write_json("calibration.json", dict(fit=fit, at_chance=[], layout=layout, noise_floor=noise_floor, sentence="tiny is fit." if fit else "tiny is not fit: it pays for length."))
    return run.finish({})


def completions(run): return {p.name: p.read_bytes() for p in sorted((run / "completions").glob("*.parquet"))}


@pytest.mark.parametrize("judge", ["live", "ema", "external"])
def test_every_identity_pays(judge, tmp_path, caplog):
    "Training runs, and scores differ from the base judge's once the adapter has moved (live, ema), or not at all (external with the same weights)"
    config = lambda j: TrainConfig(runs=str(tmp_path / j), judge=j, judge_model="tiny" if j == "external" else "", lr=.02, warmup_steps=0, ema_decay=.5, **SMALL)
    runs = {j: train(config(j)) for j in ("base", judge)}
    first, last = ({j: read_parquet(r / "completions" / f"{k:06d}.parquet") for j, r in runs.items()} for k in (1, 3))
    np.testing.assert_array_equal(first["base"].score, first[judge].score)
    own = lambda t: t[[c for c in t if not c.startswith("base.")]]
    assert list(own(last[judge])) == list(last["base"]) and "base.held.need" in last[judge]
    if judge == "external": assert own(last[judge]).equals(last["base"]) and last[judge]["base.held.need"].equals(last["base"]["held.need"])
    else: assert not last["base"].score.equals(last[judge].score)
    assert "has not been calibrated" in caplog.text


def test_observers_leave_no_mark(tmp_path):
    "Looking at the probe set at every step, or only at the ends, is the same run"
    often, seldom = (train(TrainConfig(runs=str(tmp_path / str(n)), judge="live", **(SMALL | dict(probe_every=n)))) for n in (1, 3))
    assert len(list((often / "drift").iterdir())) > len(list((seldom / "drift").iterdir()))
    assert completions(often) == completions(seldom)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"): assert (often / name).read_bytes() == (seldom / name).read_bytes(), name


def test_a_gated_run_learns_nothing(tmp_path, monkeypatch):
    "With a noise floor above any spread and no veto every group is gated, rewards are flat within groups, and the adapter stays where it began"
    monkeypatch.setattr("hmx_feel.grpo.text_veto", lambda text: "")
    monkeypatch.setattr(Rubric, "vetoed", lambda self, value: np.zeros(len(value), bool))
    run = train(TrainConfig(runs=str(tmp_path), noise_floor=1., beta=0., **SMALL))
    assert (run.metrics().gated == 1).all()
    df = read_parquet(run / "completions" / "000001.parquet")
    for _, g in df.groupby("prompt_id"): assert g.reward.nunique() <= 1
    moved = [w.abs().max().item() for n, w in load_file(run / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n]
    assert max(moved) == 0


def test_gate_worked_by_hand():
    pay = np.array([.1, .2, .3, .4, .5, .5, .5, .5, np.nan, .7, np.nan, np.nan])
    out, closed = gate(pay, 4, .14)
    assert closed.tolist() == [True, True, False]      # standard deviations .129 and 0; one score alone has none
    np.testing.assert_allclose(out, [.25] * 4 + [.5] * 4 + [np.nan, .7, np.nan, np.nan])
    third, _ = gate(np.array([.3, .3, .4, .3, .3, .3]), 6, .5)
    assert abs(third[0] - .31667) < 1 / 1024 and (third * 1024 % 1 == 0).all()   # sums of such numbers are exact, so that no advantage is left over
    assert gate(pay, 4, 0.)[1].tolist() == [False, False, False]


def test_calibration_is_read(tmp_path, caplog):
    "Layout and noise floor come from it, for all arms alike; an asked value wins; an unfit judge is named"
    for arm in ("forward", "vicarious", "inverted"):
        assert resolve(TrainConfig(runs=str(tmp_path), arm=arm)).noise_floor is None
    assert "has not been calibrated" in judge_warnings(TrainConfig(runs=str(tmp_path)))[0]
    calibrated(tmp_path, fit=False, layout="criterion_last", noise_floor=.03)
    for arm in ("forward", "vicarious", "inverted"):
        got = resolve(TrainConfig(runs=str(tmp_path), arm=arm))
        assert (got.layout, got.noise_floor) == ("criterion_last", .03)
    asked = resolve(TrainConfig(runs=str(tmp_path), layout="rubric_first", noise_floor=.2))
    assert (asked.layout, asked.noise_floor) == ("rubric_first", .2)
    assert judge_warnings(TrainConfig(runs=str(tmp_path))) == ["tiny is not fit: it pays for length."]
    assert known_judge(TrainConfig(runs=str(tmp_path), min_mass=.6)) is None and "no group is gated" not in judge_warnings(TrainConfig(runs=str(tmp_path), min_mass=.6, noise_floor=.1))[0]
    ids = {content_hash(check_run(TrainConfig(runs=str(tmp_path), noise_floor=f))["identity"]) for f in (None, .2)}
    assert len(ids) == 2, "the noise floor decides what is paid and belongs to the run's identity"


def test_an_endpoint_has_calibrations_of_its_own(tmp_path):
    "It may carry the name of a local model; address, price, timeout and retries reach the judge, and its account outlives an interruption"
    url = "http://localhost:1/v1"
    config = TrainConfig(runs=str(tmp_path), judge="external", judge_model="tiny", judge_url=url + "/", layout="criterion_last", judge_price="1, 2", judge_timeout=7, judge_retries=1)
    calibrated(tmp_path, noise_floor=.1)
    assert known_judge(config) is None and f"tiny at {url}" in judge_warnings(config)[0]
    calibrated(tmp_path, noise_floor=.2, url=url)
    assert known_judge(config)["noise_floor"] == .2 and known_judge(TrainConfig(runs=str(tmp_path)))["noise_floor"] == .1
    judge = external_judge(config, Rubric.load("hmx-feel"))
    assert (judge.timeout, judge.retries, judge.prices) == (7, 1, (1, 2)) and "feeling.shade" not in judge.head
    assert content_hash(check_run(config)["identity"]) == content_hash(check_run(config.model_copy(update=dict(judge_price="", judge_timeout=9.)))["identity"])
    run = Run(tmp_path / "spent")
    for sitting in (1, 2):
        reward = RubricReward(None, None, [], config, run)
        reward.spent = [run.read_json("judge_usage.json")] if sitting == 2 else []
        judge.usage.update(requests=10, cost=.5, logprobs=True)
        reward.judges = dict(pays=judge)
        reward._account()
        assert (run.read_json("judge_usage.json")["requests"], run.read_json("judge_usage.json")["cost"]) == (10 * sitting, .5 * sitting)
    assert add_up([judge.usage, dict(judge.usage, logprobs=False)])["logprobs"] is False
    with pytest.raises(UserError, match="judge_price"): TrainConfig(judge_price="cheap")


@pytest.mark.parametrize("change,words", [
    (dict(judge="bose"), ["judge", "nearest: 'base'"]), (dict(judge="external"), ["judge_model"]), (dict(judge_model="tiny"), ["judge=external"]),
    (dict(judge="external", judge_model="tiyn"), ["tiyn", "nearest: 'tiny'"]), (dict(layout="rubric_frist"), ["layout", "nearest: 'rubric_first'"])])
def test_a_wrong_judge_is_refused_before_anything_loads(tmp_path, change, words):
    with pytest.raises(UserError) as e: check_run(TrainConfig(runs=str(tmp_path), **change))
    assert all(w in str(e.value) for w in words) and not list(tmp_path.iterdir())
