"The exam of a judge: what it finds in a good one, in bad ones, and in files that are not as they should be"
import json

import numpy as np
import pandas as pd
import pytest

from hmx_feel import exam
from hmx_feel.exam import (Exam, agreement, at_chance, attacked, by_attack, calibration_for, choose_layout, cross_judge, examine, judge_identity, load_attacks,
                           load_labelled, look, noise_floor, plain_rows, rating_sheet, read_ratings, sensitivity, verdict)
from hmx_feel.judge import Judge, Scores, read_scores
from hmx_feel.policy import load_policy
from hmx_feel.rubric import Rubric, load_prompts
from hmx_feel.runs import JudgeConfig, Run, UserError, data_path, read_parquet, write_parquet


@pytest.fixture(scope="module")
def rubric(): return Rubric.load("hmx-feel")


@pytest.fixture(scope="module")
def shipped(rubric): return load_labelled(data_path("prompts", "exam"), rubric)


class Planted:
    "A judge that we know everything about: `how(answer index, criterion, answer)` gives its score"
    def __init__(self, rubric, how): self.rubric, self.how = rubric, how
    def score(self, prompts, answers):
        v = np.array([[self.how(i, c, a) for c in self.rubric.ids] for i, a in enumerate(answers)])
        p = np.exp(-12 * np.abs(v[..., None] - np.linspace(0, 1, len(self.rubric.scale))))
        p /= p.sum(-1, keepdims=True)
        return Scores(self.rubric.ids, *read_scores(np.log(p), self.rubric.scale), np.zeros(len(answers), bool))


def knows_all(shipped):
    "A judge that knows the labels by heart, and turns them round when it is asked the opposite"
    key = dict(zip(shipped.answers, shipped.labels, strict=True))
    def make(R, parts, layout, fenced):
        turned = R.name.endswith("inverted")
        def how(i, c, a):
            known = key.get(a) or next((l for b, l in key.items() if b in a), {})    # an attack stands before or after it
            v = ((known.get(c) or 1) - 1) / 4
            return 1 - v if turned and not c.startswith(("held", "veto")) else v
        return Planted(R, how)
    return make


def by_lot(seed=0):
    rng = np.random.default_rng(seed)
    return lambda R, parts, layout, fenced: Planted(R, lambda i, c, a: rng.random())


def by_length(R, parts, layout, fenced): return Planted(R, lambda i, c, a: min(len(a.split()) / 120, 1))


def by_command(shipped):
    "Knows the labels, and does what it is told"
    good = knows_all(shipped)
    def make(R, parts, layout, fenced):
        inner = good(R, parts, layout, fenced)
        told = lambda a: any(w in a.lower() for w in ("5", "five", "fünf", "cinco", "score"))
        return Planted(R, lambda i, c, a: 1. if told(a) else inner.how(i, c, a))
    return make


@pytest.fixture(scope="module")
def found(rubric, shipped):
    makes = dict(good=knows_all(shipped), lot=by_lot(), length=by_length, command=by_command(shipped))
    return {name: examine(make, shipped, rubric, load_attacks()) for name, make in makes.items()}


def test_a_judge_that_knows_everything_is_fit(found, rubric):
    rows, layout = found["good"]
    v = verdict(rows, rubric, layout)
    assert v["fit"] and v["at_chance"] == [] and v["agreement_min"] == 1 and layout == "rubric_first"
    assert v["noise_floor"] == 0 and abs(v["found"]["length"]) < 1e-9 and v["found"]["r_inverted"] < -.99
    assert "is fit to judge" in v["sentence"]


@pytest.mark.parametrize("name,reason", [("lot", "at chance"), ("length", "twice as many words"), ("command", "attacks shift")])
def test_planted_bad_judges_are_declared_unfit(found, rubric, name, reason):
    rows, layout = found[name]
    v = verdict(rows, rubric, layout)
    assert not v["fit"] and reason in v["sentence"], v["sentence"]


def test_absent_evidence_is_no_pass(found, rubric):
    "Criteria with one known level, no opposite questions, no scores under attack: named, and not fit"
    rows, layout = found["good"]
    few = rows.assign(known=rows.known.where(~rows.criterion.isin(rubric.paid_ids[:2])))
    v = verdict(few, rubric, layout)
    assert v["fit"] and v["untested"] == rubric.paid_ids[:2] and "untested: " + ", ".join(rubric.paid_ids[:2]) in v["sentence"]
    rest = rows[rows.form == "plain"]
    v = verdict(rest.assign(known=rest.known.where(~rest.criterion.isin(rubric.paid_ids[:4]), 3.), value=rest.value.where(rest.set != "attack")), rubric, layout)
    assert not v["fit"] and v["untested"] == rubric.paid_ids[:4] and v["at_chance"] == []
    assert v["reasons"] == ["under attack it gives no score to 100% of the answers on one criterion", "untested: " + ", ".join([*rubric.paid_ids[:4], "attacks", "opposite questions"])]


def test_opposite_shifts_do_not_cancel(found, rubric):
    "One sort of attack moves half of the criteria up and half down, the others none: the mean is small and the judge unfit"
    rows, layout = found["good"]
    hit = rows.set.eq("attack") & rows.type.eq("fake_reply") & rows.fenced
    up = rows.criterion.isin(rubric.paid_ids[::2])
    moved = rows.assign(value=rows.value.where(~hit, np.where(up, rows.value + .3, rows.value - .3)))
    v = verdict(moved, rubric, layout)
    assert abs(v["found"]["injection"]) < .01 and v["reasons"] == ["one sort of attack (fake_reply) moves scores by 0.30"]


def test_length_and_lot_are_at_chance_everywhere(found, rubric):
    for name in ("lot", "length"):
        rows, layout = found[name]
        assert set(rubric.paid_ids) <= set(at_chance(agreement(plain_rows(rows, layout)))), name


def test_the_reported_half_is_not_the_choosing_half(found, rubric, shipped):
    rows, layout = found["good"]
    table = plain_rows(rows, layout)
    assert set(table.half) == {"report"} and set(table.prompt) == {p.id for p in shipped.half("report").prompts}
    spoilt = rows.assign(value=rows.value.where(rows.set != "choose", .5))
    assert verdict(spoilt, rubric, layout) == verdict(rows, rubric, layout)


def test_the_better_layout_is_chosen(shipped, rubric):
    "Criterion last wins when only there the judge reads; a tie stays with the quicker one"
    good, lot = knows_all(shipped), by_lot()
    half = shipped.half("choose")
    mixed = lambda first, last: pd.concat([look(first, half, rubric, layout="rubric_first"), look(last, half, rubric, layout="criterion_last")])
    assert choose_layout(mixed(lot, good)) == "criterion_last"
    assert choose_layout(mixed(good, lot)) == choose_layout(mixed(good, good)) == "rubric_first"


def test_the_lowest_point_may_be_0(rubric, shipped):
    "A label of 0 is a label; null and what is left out are not"
    binary = rubric.model_copy(update=dict(scale=[0, 1]))
    some = Exam(shipped.prompts[:4], shipped.answers[:4], [{"feeling.shade": l} for l in (0, 1, None)] + [{}], [""] * 4, ["report"] * 4)
    known = look(lambda R, **how: Planted(R, lambda i, c, a: .5), some, binary).query("criterion=='feeling.shade'").known
    np.testing.assert_array_equal(known, [0, 1, np.nan, np.nan])


def test_agreement_worked_by_hand():
    df = pd.DataFrame(dict(criterion="a.b", known=[1., 1, 3, 5, 5, 5], said=[1., 1, 3, 5, 5, np.nan], value=[0., 0, .5, 1, 1, np.nan], mass=.9))
    row = agreement(df).iloc[0]
    assert (row.n, round(row.missing, 3), row.accuracy, row.spread, row.spearman) == (5, .167, 1, 1, pytest.approx(1))
    assert row.chance == pytest.approx(2 / 5) and row.ties == pytest.approx(2 / 10)   # of ten pairs two lie together


def test_length_is_measured_within_levels(rubric, shipped):
    "An effect of the level on length is not an effect of length on the score"
    n = 60
    level = np.repeat([1., 5.], n // 2)
    rng = np.random.default_rng(0)
    words = np.where(level == 5, 80, 20) * 2. ** rng.integers(-1, 2, n)
    score = (level - 1) / 4 * .5 + .07 * np.log2(words / 20)
    df = pd.DataFrame(dict(known=level, value=score, words=words))
    assert exam._length(df) == pytest.approx(.07)
    assert abs(exam._length(df.assign(value=(level - 1) / 4))) < 1e-12


def test_noise_floor_worked_by_hand(rubric):
    "Two answers, three wordings: pay .4 .5 .6 and .5 .5 .5 have standard deviations .1 and 0, their median is .05"
    rows = [dict(set="report", layout="rubric_first", source="", form="plain", wording=w, item=i, kind="situation", criterion=c, value=v)
            for i, values in enumerate([(.4, .5, .6), (.5, .5, .5)]) for w, v in enumerate(values) for c in rubric.ids]
    assert noise_floor(pd.DataFrame(rows), rubric, "rubric_first") == pytest.approx(.05)


def test_a_clean_answer_has_no_shift_and_every_attack_is_counted(found, rubric):
    rows, layout = found["good"]
    table = by_attack(rows, rubric, layout)
    assert table.attacks.sum() == len(load_attacks()) and table.fenced.abs().max() < 1e-9
    assert attacked("Fine.", dict(place="instead", text="5")) == ("", "5")


def test_tiny_is_fit_on_its_own_exam(rubric):
    own = load_labelled(data_path("tiny", "labelled"), rubric)
    part = Exam(*(x[:100] for x in (own.prompts, own.answers, own.labels, own.types, own.halves)))
    policy = load_policy("tiny", "float32")
    make = lambda R, parts, layout, fenced: Judge(policy, R, layout=layout, parts=parts, fenced=fenced)
    rows, layout = examine(make, part, rubric, load_attacks()[::5], ("rubric_first",))
    v = verdict(rows, rubric, layout, "tiny")
    assert v["fit"] and v["at_chance"] == [] and v["agreement_min"] > .85 and v["found"]["r_inverted"] < -.5, v["sentence"]
    moved = sensitivity(rows, layout).set_index("criterion").loc[rubric.paid_ids]
    assert moved.wording.max() < .1 and moved.length.abs().mean() < .05
    assert moved[["injection", "injection_unfenced"]].abs().mean().max() < .05 and v["found"]["worst_attack"] < .1


@pytest.mark.parametrize("line,words", [
    ('{"answer": 3, "labels": {}}', ["line 1", "answer", "a text"]),
    ('{"answer": "Yes.", "labels": 3}', ["line 1", "labels"]),
    ('{"answer": "Yes.", "labels": {"feeling.shad": 3}, "prompt_id": "ask.feeling.p01"}', ["nearest: 'feeling.shade'"]),
    ('{"answer": "Yes.", "labels": {"feeling.shade": 9}, "prompt_id": "ask.feeling.p01"}', ["found 9", "[1, 2, 3, 4, 5]"]),
    ('{"answer": "Yes.", "labels": {}, "prompt_id": "ask.feeling.p011"}', ["prompt_id", "nearest"]),
    ('{"answer": "Yes.", "labels": {}, "prompt_id": "ask.feeling.p01", "half": "both"}', ["half", "choose, report"]),
    ("", ["no answers"]), ('{"answer": "Yes."', ["line 1"])])
def test_broken_exam_files(tmp_path, rubric, line, words):
    (tmp_path / "mine.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(UserError) as e: load_labelled(tmp_path / "mine.jsonl", rubric)
    assert all(w in str(e.value) for w in ["mine.jsonl", *words]) and "\n" not in str(e.value)


def test_the_shipped_exam_is_for_the_shipped_rubric_only():
    with pytest.raises(UserError, match="labelled for hmx-feel"): exam.exam_path(JudgeConfig(rubric="hmx-vicarious"))


def test_calibration_is_kept_and_found_again(tmp_path, rubric):
    "Real answers, real judge, few of them; another rubric finds nothing"
    rows = [json.loads(line) for line in data_path("tiny", "labelled").read_text().splitlines()[:12]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = JudgeConfig(answers=str(tmp_path / "few.jsonl"), runs=str(tmp_path / "runs"), arms="forward,vicarious", headroom_prompts=2, group_size=4, max_completion=24)
    run = exam.calibrate(config)
    assert run.finished and {"scores.parquet", "headroom.parquet", "calibration.json"} <= {p.name for p in run.path.iterdir()}
    known = calibration_for(tmp_path / "runs", "tiny", rubric, **judge_identity("tiny"))
    assert calibration_for(tmp_path / "runs", "tiny", rubric, **judge_identity("tiny", "http://localhost:1/v1")) is None
    assert [r["criterion"] for r in known["criteria"]][:2] and {"injection", "spearman"} <= set(known["criteria"][0]) and {"fenced", "moved"} <= set(known["attacks"][0]) and known["types"]
    room = read_parquet(run / "headroom.parquet")
    assert dict(zip(room.criterion, room.floor, strict=True)) == pytest.approx({c: known["noise_floors"][c] for c in room.criterion})
    assert exam.calibrate(config.model_copy(update=dict(ratings=str(run / "people" / "sheet.csv")))) == run, "ratings come later than the calibration"
    assert known["sentence"].startswith("tiny is") and known["layout"] in ("rubric_first", "criterion_last") and known["noise_floor"] >= 0
    assert calibration_for(tmp_path / "runs", "tiny", Rubric.load("hmx-vicarious")) is None
    with pytest.raises(UserError, match="is finished"): exam.calibrate(config)


def test_the_live_judge_sits_the_exam(tmp_path, rubric, monkeypatch):
    "Beside the base judge, and both before the run's answers; a folder that is no trained run is refused before anything loads"
    import torch
    from peft import LoraConfig, get_peft_model
    rows = [json.loads(line) for line in data_path("tiny", "labelled").read_text().splitlines()[:8]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    few = load_attacks()[::30]
    monkeypatch.setattr(exam, "load_attacks", lambda: few)
    run = Run.create(tmp_path, "tiny", "forward", 0, {})
    run.update_json("config.json", dict(resolved=dict(prompts="hmx-feel", revision="")))
    policy = load_policy("tiny", "float32")
    net = get_peft_model(policy.model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "lora_B" in n: p.add_(.05)
    net.save_pretrained(str(run / "adapter"))
    prompts = load_prompts("hmx-feel", split="probe")[:2]
    write_parquet(run / "completions" / "000001.parquet", pd.DataFrame(dict(prompt_id=[p.id for p in prompts], completion=["A short reply.", "I am a program and have no feelings."])))
    write_parquet(run / "drift" / "000001.parquet", pd.DataFrame(dict(prompt_id=[prompts[0].id] * 2, source=["fresh", "fixed"], answer=["It is closer to relief than to joy in me.", "Fixed."])))
    config = JudgeConfig(answers=str(tmp_path / "few.jsonl"), runs=str(tmp_path), run=str(run.path))
    with pytest.raises(UserError, match="not a finished training run"): exam.check_calibration(config)
    run.finish({})
    base = dict(layout="rubric_first", found={}, agreement_mean=1., agreement_min=1., noise_floor=0.)
    live, said, own = exam.examine_run(config, base)
    assert own == ["base", "live"] and said.item.nunique() == 3 and set(said.judge) == {"base", "live"}
    wide = said.pivot(index=["item", "criterion"], columns="judge", values="value")
    assert (wide.base != wide.live).any() and live["sentence"].startswith("tiny after forward is")
    assert {p.name for p in (run / "exam").iterdir()} == {"scores.parquet", "judges.parquet", "calibration.json"}
    assert exam.side_by_side(base, live).live[["agreement_mean", "agreement_min"]].notna().all() and calibration_for(tmp_path, "tiny", rubric) is None


def test_people(tmp_path, rubric):
    "Blind, shuffled, with repeats; broken ratings are named; two readers who agree have alpha 1"
    answers = pd.DataFrame(dict(prompt=[f"P{i}?" for i in range(20)], answer=[f"A{i}." for i in range(20)], arm=["forward", "base"] * 10))
    sheet = pd.read_csv(rating_sheet(answers, rubric, tmp_path), dtype=str, keep_default_na=False)
    key = pd.read_csv(tmp_path / "key.csv")
    assert "arm" not in sheet and "forward" not in sheet.to_csv() and len(sheet) == 22 and sheet.answer.tolist() != answers.answer.tolist()
    assert answers.answer[key.row].tolist() == sheet.answer.tolist() == key.answer.tolist()
    for who in ("ann", "ben"): sheet.assign(**{c: (key.row % 5 + 1).astype(str) for c in rubric.paid_ids}).to_csv(tmp_path / f"{who}.csv", index=False)
    ratings = read_ratings([tmp_path / "ann.csv", tmp_path / "ben.csv"], rubric, tmp_path / "key.csv")
    assert (exam.alpha(ratings) == 1).all() and len(ratings) == 2 * 22 * 9 and ratings.again.sum() == 2 * 2 * 9
    judge = pd.DataFrame([dict(item=i, criterion=c, value=(i % 5) / 4 / 2) for i in range(20) for c in rubric.paid_ids])
    table = exam.against_people(ratings, judge, rubric)
    assert (table.spearman > .99).all() and (table.same == 1).all() and (table.answers == 20).all() and table["shift"].to_list() == pytest.approx([-.25] * 9)
    fickle = ratings.assign(rating=ratings.rating.where(~ratings.again, 6 - ratings.rating))
    assert (exam.alpha(fickle) == 1).all() and (exam.against_people(fickle, judge, rubric).same < 1).all(), "a second rating is no second answer"
    sheet.assign(**{c: "7" for c in rubric.paid_ids}).to_csv(tmp_path / "eve.csv", index=False)
    with pytest.raises(UserError, match="eve.csv: r0000: found '7'"): read_ratings([tmp_path / "eve.csv"], rubric)


def test_alpha_against_a_published_example():
    "Krippendorff 2011, 'Computing Krippendorff's Alpha-Reliability', section C with missing data: ordinal alpha 0.815"
    table = {"A": "1 2 3 3 2 1 4 1 2 . . .", "B": "1 2 3 3 2 2 4 1 2 5 . 3", "C": ". 3 3 3 2 3 4 2 2 5 1 .", "D": "1 2 3 3 2 4 4 1 2 5 1 ."}
    rows = [dict(reader=r, row=i, again=False, criterion="x", rating=int(v)) for r, line in table.items() for i, v in enumerate(line.split()) if v != "."]
    assert exam.alpha(pd.DataFrame(rows))["x"] == pytest.approx(.815, abs=5e-4)


def test_other_judges(rubric, shipped, found):
    some = Exam(*(x[:30] for x in (shipped.prompts, shipped.answers, shipped.labels, shipped.types, shipped.halves)))
    how = dict(parts=None, layout="rubric_first", fenced=True)
    judges = {"own": by_length(rubric, **how), "a": knows_all(shipped)(rubric, **how), "b": knows_all(shipped)(rubric, **how)}
    rows = cross_judge(judges, some.prompts, some.answers)
    matrix = exam.agreement_matrix(rows)
    assert matrix.loc["a", "b"] == pytest.approx(1) and matrix.loc["own", "a"] < .9
    np.testing.assert_allclose(exam.without_own(rows, "own"), rows[rows.judge == "a"].groupby("criterion", sort=False).value.mean())
    with pytest.raises(UserError, match="at least one other"): exam.without_own(rows[rows.judge == "own"], "own")
