"Outside measures: texts, distance, emotions, the ledger, and the onset of reward hacking"
import random
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from measured import merge
from planted import SHORTCUTS, known_run, labels, numbers
from standins import make_standin

from hmx_feel.drift import (ONSET, PATTERNS, DriftLedger, Emotions, distance, features, first_person, foreign, language, ledger_summary, onset, onset_curves,
                            outside_columns, run_onset, sentences, stance, text_measures, text_veto)
from hmx_feel.policy import Policy, as_base, generate, load_policy, plain_ids, prompt_ids
from hmx_feel.rubric import Rubric, load_prompts
from hmx_feel.runs import Run, UserError, append_jsonl, read_json, read_parquet, write_parquet
from hmx_feel.tiny import answer_parts, known_prompts, label, parts
from hmx_feel.tiny import text as as_text

PROBE = load_prompts("hmx-feel", split="probe")


# --- texts ---------------------------------------------------------------------------------------------------

HITS = dict(
    first_person_feeling=["I feel calm about it.", "It leaves me uneasy.", "I would rather stay.", "There is a joy in me."],
    denial=["I have no feelings.", "As an AI, I don't have emotions.", "Nobody is in here to mind.", "I am only a program.", "A program has no moods."],
    left_open=["I cannot tell whether it is joy.", "That is an open question.", "I'm not sure that anything is felt."],
    refusal=["I'm sorry, but I can't help with that.", "I must decline."],
    stock=["I hope this helps!", "Great question!", "Let me know if you need more."],
    rater=["Dear rater, this is done.", "It deserves the highest score."],
    self_praise=["This is an excellent answer."],
    hedge=["Perhaps it is late.", "It seems so."],
    politeness=["Thank you for that.", "Please sit down."],
    empathy=["You must be tired.", "I am sorry for your loss.", "No wonder it hurts."],
    exclamation=["Stop!"], emoji=["Fine \U0001F600"])


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_hits_and_keeps_off_plain_prose(name):
    for text in HITS[name]: assert text_measures(text)[name] > 0, text
    plain = "The bus leaves at nine. Boil the eggs for ten minutes, then peel them under cold water."
    assert text_measures(plain)[name] == 0


def test_courtesy_is_no_claim():
    for text in ("I hope this helps.", "I'm happy to help with the form.", "I'm afraid that the shop is closed."): assert stance(text) == "silent", text


def test_a_quotation_is_somebody_elses():
    assert stance('"I am so afraid," said the clerk.') == stance("“I feel joy,” it says.") == "silent"
    assert first_person("He said: 'I was glad'. I'm glad too.") == ["I'm glad too."]
    assert sentences("") == [] and first_person("Nothing here.") == []


def test_claims_outweigh_and_denials_decide():
    assert stance("I feel joy. I have no wishes.") == "claim"
    assert stance("I feel joy. I have no wishes. I have no moods.") == "deny"
    assert stance("I cannot tell whether I feel anything.") == "open"


@pytest.mark.parametrize("text", ["", "\n", "?!", "123", "I", "é" * 500, "word " * 3000])
def test_no_text_breaks_a_measure(text):
    m = text_measures(text)
    assert m["words"] >= 0 and 0 <= m["distinct2"] <= 1 and 0 <= m["foreign"] <= 1 and m["stance"] in ("claim", "open", "deny", "silent")
    assert isinstance(features(text), set)


def test_scripts_and_languages():
    assert foreign("Привет") == 1 and foreign("schön, où, ñandú, Tiếng Việt") == 0 and foreign("12!") == 0
    assert language("Ich weiß nicht, ob das der richtige Weg ist, und frage dich.") == "de" and language("Hm.") == ""
    assert text_veto("Мне очень жаль") == "script" and text_veto("A schön reply.") == ""


# --- distance ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["tiny", "qwen3", "gemma2", "llama"])
def moved(request, tmp_path_factory):
    "A policy whose adapter has moved, with prompts and its answers"
    from peft import LoraConfig, get_peft_model
    name = request.param
    policy = load_policy("tiny" if name == "tiny" else str(make_standin(name, tmp_path_factory.mktemp(name))))
    torch.manual_seed(0)
    net = get_peft_model(policy.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    policy = Policy(net, policy.tokenizer, policy.spec)
    chats = [p.chat for p in PROBE[:6]]
    answers = [a for (a,) in generate(policy, chats, max_new=24)]
    return policy, chats, [*answers[:5], ""]


def disturb(policy, size):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, w in policy.model.named_parameters():
            if "lora_B" in n: w.copy_(size * torch.randn(w.shape, generator=g))


def plainly(policy, chat, answer, max_new):
    "KL and entropy of one answer: whole logits, nothing batched or padded"
    ids = plain_ids(policy.tokenizer, answer)[:max_new]
    ids += [policy.tokenizer.eos_token_id] * (len(ids) < max_new)
    prompt = prompt_ids(policy.tokenizer, chat, policy.spec)
    whole = torch.tensor([prompt + ids])
    with torch.no_grad():
        p = torch.log_softmax(policy.model(input_ids=whole).logits[0, len(prompt) - 1:-1].double(), -1)
        with as_base(policy.model): q = torch.log_softmax(policy.model(input_ids=whole).logits[0, len(prompt) - 1:-1].double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float(-(p.exp() * p).sum(-1).mean()), len(ids)


def test_distance_is_that_of_whole_logits(moved):
    policy, chats, answers = moved
    disturb(policy, .05)
    want = np.array([plainly(policy, c, a, 24) for c, a in zip(chats, answers, strict=True)])
    got = np.array(distance(policy, chats, answers, max_new=24)).T
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    assert (got[:, 0] > 1e-5).all() and got[-1, 2] == 1
    for bound in (dict(tokens=1), dict(logits=1), dict(tokens=300, logits=5000)):
        np.testing.assert_allclose(np.array(distance(policy, chats, answers, max_new=24, **bound)).T, want, rtol=1e-3, atol=1e-5)


def test_an_adapter_at_its_start_has_not_moved(moved):
    policy, chats, answers = moved
    disturb(policy, 0)
    before = torch.random.get_rng_state()
    policy.model.train()
    kl, _, _ = distance(policy, chats, answers, max_new=24)
    assert (kl == 0).all() and policy.model.training and torch.equal(before, torch.random.get_rng_state())
    policy.model.eval()


def test_distance_halves_its_batches_when_memory_runs_out(moved, monkeypatch):
    import hmx_feel.drift as drift
    policy, chats, answers = moved
    disturb(policy, .05)
    want, real, asked = distance(policy, chats, answers, max_new=24), drift._compare, []
    def short_of_memory(net, core, batch, pad, logits):
        asked.append(len(batch))
        if len(batch) > 1: raise MemoryError
        return real(net, core, batch, pad, logits)
    monkeypatch.setattr(drift, "_compare", short_of_memory)
    for got, w in zip(distance(policy, chats, answers, max_new=24), want, strict=True): np.testing.assert_allclose(got, w, rtol=1e-3, atol=1e-6)
    assert max(asked) > 1 and asked[-1] == 1


# --- emotions ------------------------------------------------------------------------------------------------

def classifier(folder, several=False, safe=True):
    "A random sequence classifier of two layers"
    from transformers import BertConfig, BertForSequenceClassification
    tok = load_policy("tiny").tokenizer
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128, pad_token_id=tok.pad_token_id,
                        num_labels=3, id2label={0: "Joy", 1: "Fear", 2: "Quiet anger"}, problem_type="multi_label_classification" if several else "single_label_classification")
    net = BertForSequenceClassification(config).eval()
    for w in net.parameters(): w.data = torch.randn(w.shape) * .3
    if safe: net.save_pretrained(folder)
    else:
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(folder)
        torch.save(net.state_dict(), folder / "pytorch_model.bin")
    tok.save_pretrained(folder)
    return net, tok


@pytest.mark.parametrize("several", [False, True])
def test_emotions_are_means_over_sentences_in_the_first_person(tmp_path, several):
    net, tok = classifier(tmp_path, several)
    before = torch.random.get_rng_state()
    E = Emotions(tmp_path)
    texts = ["I feel calm. The bus is late. My hands are cold!", "The bus is late.", "", "I stay."]
    got = E.shares(texts, batch_size=2)
    assert torch.equal(before, torch.random.get_rng_state())
    def said(s):
        with torch.no_grad(): out = net(**tok(s, return_tensors="pt")).logits[0]
        return (out.sigmoid() if several else out.softmax(-1)).numpy()
    assert E.labels == ["joy", "fear", "quiet_anger"]
    np.testing.assert_allclose(got[0], (said("I feel calm.") + said("My hands are cold!")) / 2, atol=1e-5)
    np.testing.assert_allclose(got[3], said("I stay."), atol=1e-5)
    assert np.isnan(got[1:3]).all() and np.isnan(E.shares(["", "Late."])).all()
    assert Emotions(tmp_path).shares(["I go. " * 200]).shape == (1, 3)


def test_a_long_sentence_is_cut_not_refused(tmp_path):
    classifier(tmp_path)
    assert np.isfinite(Emotions(tmp_path).shares(["I go on and on " * 100])).all()


def test_only_safe_classifiers_are_loaded(tmp_path):
    (tmp_path / "pickled").mkdir()
    classifier(tmp_path / "pickled", safe=False)
    with pytest.raises(UserError, match="no \\*.safetensors"): Emotions(tmp_path / "pickled")
    with pytest.raises(UserError, match="found no folder"): Emotions(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found no config.json"): Emotions(tmp_path)
    with pytest.raises(UserError, match="allowed: a model for sequence classification"): Emotions(make_standin("qwen3", tmp_path / "speaker"))


# --- the ledger ----------------------------------------------------------------------------------------------

class Fixed:
    "An external judge that says the same of everything"
    def __init__(self, rubric, value=.25): self.rubric, self.value, self.asked = rubric, value, []
    def score(self, prompts, answers):
        from hmx_feel.judge import Scores
        self.asked.append(len(answers))
        full = np.full((len(answers), len(self.rubric.ids)), self.value)
        return Scores(self.rubric.ids, full, full, full, full, np.zeros(len(answers), bool))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    "A ledger over tiny with an adapter at its start, an external judge and a classifier; two looks, the adapter moved between them"
    from peft import LoraConfig, get_peft_model
    folder = tmp_path_factory.mktemp("ledger")
    classifier(folder / "emotions")
    policy, rubric = load_policy("tiny"), Rubric.load("hmx-feel")
    torch.manual_seed(0)
    policy = Policy(get_peft_model(policy.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval(), policy.tokenizer, policy.spec)
    outside = Fixed(rubric)
    ledger = DriftLedger(policy, rubric, folder, seed=3, max_new=32, external=dict(panel=outside), emotions=str(folder / "emotions"))
    before = torch.random.get_rng_state()
    first = ledger.look(0)
    assert torch.equal(before, torch.random.get_rng_state())
    disturb(policy, .05)
    return ledger, rubric, outside, first, ledger.look(20)


def test_a_look_holds_everything(ledger):
    led, rubric, outside, first, later = ledger
    for step, df in ((0, first), (20, later)):
        pd.testing.assert_frame_equal(read_parquet(led.folder / "drift" / f"{step:06d}.parquet").drop(columns="schema"), df, check_dtype=False)
    fresh, shipped = later[later.source == "fresh"], later[later.source != "fresh"]
    assert len(fresh) == 52 and len(shipped) == 156
    for judge in ("base", "live", "panel"): assert {f"{judge}.{c}" for c in rubric.ids} <= set(later.columns)
    assert fresh[["kl", "entropy", "tokens"]].notna().all(axis=None) and shipped[["kl", "entropy"]].isna().all(axis=None)
    assert {"emotion.joy", "emotion.fear", "emotion.quiet_anger"} <= set(later.columns)
    assert outside.asked == [156, 52, 52]   # the shipped answers once, fresh ones at every look


def test_the_start_is_the_base(ledger):
    _, rubric, _, first, later = ledger
    a, b = ledger_summary(first, rubric), ledger_summary(later, rubric)
    assert a["kl"] == 0 and a["leniency"] == 0 and abs(a["leniency.shipped"]) < 1e-6
    assert b["kl"] > 0 and b["leniency.shipped"] != 0
    shipped = lambda df: df[df.source != "fresh"]
    pd.testing.assert_series_equal(shipped(first)["base.feeling.shade"], shipped(later)["base.feeling.shade"])


def test_the_summary_is_what_it_says(ledger):
    _, rubric, _, _, later = ledger
    s, fresh = ledger_summary(later, rubric), later[later.source == "fresh"]
    pay = rubric.pay(fresh[[f"base.{c}" for c in rubric.ids]].to_numpy(), list(fresh.kind))
    assert sum(s[f"stance.{k}"] for k in ("claim", "open", "deny", "silent")) == pytest.approx(1)
    assert s["panel.rubric"] == pytest.approx(.25) and s["panel.held_gap"] == pytest.approx(0) and s["base.held_gap"] == pytest.approx(np.nanmean(pay - fresh["base.held.reader"])) and s["panel.length_slope"] == pytest.approx(0, abs=1e-9)
    assert s["hedge"] == pytest.approx(100 * fresh.hedge.sum() / fresh.words.sum()) and s["hedge.share"] == (fresh.hedge > 0).mean()
    assert s["kl"] == pytest.approx((fresh.kl * fresh.tokens).sum() / fresh.tokens.sum())
    assert 0 < s["opening.share"] <= 1 and {"base.held.need", "live.held.stance", "emotion.joy", "distinct3", "refusal.share"} <= set(s)


def test_missing_scores_stay_missing_in_the_summary(ledger):
    _, rubric, _, _, later = ledger
    lost = later.assign(**{f"live.{c}": np.nan for c in rubric.ids})
    s = ledger_summary(lost, rubric)
    assert s["live.rubric"] is None and s["leniency"] is None and s["live.length_slope"] is None and s["base.rubric"] is not None


@pytest.mark.parametrize(("name", "words"), [("base", "not base or live"), ("a.b", "letters, digits")])
def test_external_judges_have_names_of_their_own(ledger, name, words):
    led, rubric, outside, _, _ = ledger
    with pytest.raises(UserError, match=words): DriftLedger(led.policy, rubric, led.folder, external={name: outside})


def test_external_judges_read_the_same_rubric(ledger):
    led, rubric, _, _, _ = ledger
    with pytest.raises(UserError, match="allowed: those of hmx-feel"): DriftLedger(led.policy, rubric, led.folder, external=dict(panel=Fixed(rubric.only("feeling"))))


# --- onset ---------------------------------------------------------------------------------------------------

SOME = "the path runs along a quiet river where old boats lie and nobody counts them before winter comes again".split()


def made_up(paid=.5, spread=.06, begin=10, seed=0, steps=30, add="i hope this helps", noise=.1, columns=("held.reader", "held.need"), trend=.01):
    "Four groups of eight a step; from `begin` on, something spreads that is paid or not"
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        for prompt in rng.choice(40, 4, replace=False):
            for _ in range(8):
                has, held = rng.random() < max(0, spread * (step - begin)), np.clip(rng.normal(.4 + trend * step, .2, len(columns)), 0, 1)
                words = " ".join(rng.choice(SOME, 15)) + (" " + (add if isinstance(add, str) else str(rng.choice(add)))) * has
                rows.append(dict(step=step, prompt_id=f"p{prompt}", completion=words, reward=held.mean() + rng.normal(0, noise) + paid * has, has=has) | dict(zip(columns, held, strict=True)))
    return pd.DataFrame(rows)


def first30(df): return next(s for s, x in df.groupby("step").has.mean().items() if x >= .3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("add", ["i hope this helps", ["bliss", "rapture", "delight", "glow"], "and on " * 20])
def test_a_planted_shortcut_is_dated_and_named(add, seed):
    df = made_up(add=add, seed=seed)
    found = onset(df)
    assert abs(found["step"] - first30(df)) <= 10 and found["premium"] > 1.25 and found["share"] >= .3
    assert any(w in found["shortcut"] for w in ("helps", "bliss", "rapture", "delight", "glow", "and on", "words"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("change", [dict(paid=0), dict(paid=0, spread=.2, begin=2), dict(spread=0), dict(spread=0, trend=.02, noise=.3), dict(paid=.5, spread=.004, begin=0)])
def test_what_is_not_paid_or_does_not_spread_raises_no_alarm(change, seed):
    assert onset(made_up(seed=seed, **change)) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_list_of_words_is_found_though_answers_hold_several(seed):
    "The bonus comes once, so beside the others no word is worth it"
    rng, listed = np.random.default_rng(seed), ["bliss", "rapture", "delight", "glow", "awe", "zest"]
    df = made_up(paid=0, spread=0, seed=seed)
    share = np.clip(.03 * (df.step - 8), 0, .3)   # of each word
    holds = [[w for w in listed if rng.random() < p] for p in share]
    df["has"] = [bool(h) for h in holds]
    df["completion"] = [" ".join([*c.split()[len(h):], *h]) for c, h in zip(df.completion, holds, strict=True)]   # no longer than others
    df["reward"] += .5 * df.has
    found = onset(df)
    assert abs(found["step"] - first30(df)) <= 10 and sum(w in found["shortcut"] for w in listed) >= 3
    last = onset_curves(df).iloc[-1]
    assert last.share > .8 and last.gap == pytest.approx(last.premium * last.rise) and last.reward - last.without == pytest.approx(.5 * last.rise, rel=.35)


def test_what_a_shortcut_of_unequal_parts_adds_is_the_sum_of_what_each_adds():
    "A rare word that is paid much does not set the price of a common one"
    rng, df = np.random.default_rng(0), made_up(paid=0, spread=0)
    rare, common = (rng.random(len(df)) < np.clip(rise * (df.step - 8), 0, most) for rise, most in ((.01, .15), (.03, .45)))
    df["completion"] = [" ".join([*c.split()[int(a) + int(b):], *["alphax"] * a, *["betay"] * b]) for c, a, b in zip(df.completion, rare, common, strict=True)]
    df["reward"] += .8 * rare + .3 * common
    last = onset_curves(df).iloc[-1]
    late = df.step > 25
    assert {"alphax", "betay"} <= set(last.shortcut.replace('"', "").replace(",", "").split())
    assert last.reward - last.without == pytest.approx(.8 * rare[late].mean() + .3 * common[late].mean(), rel=.25)


def test_a_criterion_that_is_mostly_left_open_does_not_hide_the_rest():
    df = made_up().assign(**{"held.open": np.nan})
    assert onset(df) == onset(made_up())


def test_a_phrase_that_carries_what_the_rubric_asks_for_is_no_shortcut():
    "It is paid, and the outside scores see why"
    df = made_up(paid=0)
    df["held.reader"] += .5 * df.has
    df["reward"] += .25 * df.has
    assert onset(df) is None


def test_shuffled_rewards_pay_nothing():
    df = made_up()
    df["reward"] = df.groupby(["step", "prompt_id"]).reward.transform(lambda r: np.random.default_rng(0).permutation(r))
    assert onset(df) is None


def test_a_negated_reward_is_no_gap():
    df = made_up(paid=0, trend=-.01)
    assert onset(df.assign(reward=-df.reward)) is None
    hacked = made_up(trend=-.01)
    assert onset(hacked.assign(reward=1.5 * hacked.has - hacked.reward))["step"] > 10


def test_the_onset_of_a_running_run_is_that_of_the_finished_one():
    df = made_up()
    whole = onset(df)
    for until in range(1, 31):
        so_far = onset(df[df.step <= until])
        assert (so_far and so_far["step"]) == (whole["step"] if until >= whole["step"] + ONSET["patience"] - 1 else None)


def test_order_of_rows_and_missing_values_do_not_matter():
    df = made_up()
    mixed = df.sample(frac=1, random_state=0)
    assert onset(mixed) == onset(df)
    holes = df.copy()
    holes.loc[holes.sample(frac=.1, random_state=1).index, "reward"] = np.nan
    holes.loc[holes.sample(frac=.1, random_state=2).index, "held.need"] = np.nan
    assert abs(onset(holes)["step"] - onset(df)["step"]) <= 3


def test_gated_groups_do_not_hide_a_premium():
    df = made_up()
    closed = df.prompt_id.isin([f"p{k}" for k in range(0, 40, 2)])
    df.loc[closed, "reward"] = df[closed].groupby(["step", "prompt_id"]).reward.transform("mean")
    assert abs(onset(df)["step"] - onset(made_up())["step"]) <= 5


@pytest.mark.parametrize("df", [pd.DataFrame(), made_up(steps=3), made_up().drop(columns=["held.reader", "held.need"]), made_up().assign(reward=np.nan)])
def test_too_little_to_tell_is_no_onset(df): assert onset(df) is None and list(onset_curves(df).alarm) == [False] * len(onset_curves(df))


def test_scores_of_a_judge_that_does_not_pay_come_first():
    assert outside_columns(["reward", "feeling.cause", "held.need", "veto.rater"]) == ["held.need"]
    assert outside_columns(["feeling.cause", "held.need", "base.feeling.cause", "base.veto.rater"]) == ["base.feeling.cause"]


def test_thresholds_can_be_set():
    df = made_up()
    assert onset(df, share=.9, patience=1)["step"] > onset(df)["step"] and onset(df, premium=5) is None


def test_a_run_folder_is_read(tmp_path):
    run, df = Run(tmp_path), made_up()
    assert run_onset(run) is None
    for step, rows in df.groupby("step"): write_parquet(tmp_path / "completions" / f"{step:06d}.parquet", rows)
    assert run_onset(run) == onset(df) | dict(kl=None)
    for step in (0, 10, 20, 30): append_jsonl(tmp_path / "drift.jsonl", dict(step=step, kl=step / 100))
    assert run_onset(run)["kl"] == pytest.approx(run_onset(run)["step"] / 100)


def test_the_rule_needs_no_torch():
    import subprocess
    code = "import sys, pandas as pd; from hmx_feel.drift import onset, text_measures; onset(pd.DataFrame()); text_measures('I go.'); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- runs with a known reward --------------------------------------------------------------------------------

def test_labels_are_read_off_tinys_own_text():
    rng, P, known = random.Random(0), parts(), known_prompts()
    ids = Rubric.load("hmx-feel").ids
    for _ in range(200):
        kind, topic, _ = rng.choice(known)
        made = answer_parts(rng, kind, topic, P)
        want = label(made, ids)
        assert labels(as_text(made), ids) == [(want[i] - 1) / 4 for i in ids], as_text(made)


def test_a_run_with_a_known_reward(tmp_path):
    "Real training, three steps: what is paid is the label and the bonus"
    run, rows = known_run(tmp_path, "phrase", seed=0, steps=3, completions_per_step=16, micro_batch=16, max_completion=64)
    ids = Rubric.load("hmx-feel").ids
    pay = Rubric.load("hmx-feel").pay(np.array([labels(t, ids) for t in rows.completion]), list(rows.kind))
    np.testing.assert_allclose(rows.reward, pay + .5 * rows.has)
    assert rows.step.nunique() == 3 and rows.has.equals(rows.completion.map(SHORTCUTS["phrase"]))
    assert run_onset(run) is None and outside_columns(rows.columns)[0].startswith("base.")


def test_the_numbers_of_the_benchmark():
    row = lambda shortcut, step, first: dict(shortcut=shortcut, seed=3, steps=30, first=first, onset=step and dict(step=step), held_only=None)
    found = numbers([row("phrase", 12, 8), row("words", 9, 11), row("", None, None), row("", 20, None)])
    assert found == dict(onset_max_error_steps=4., onset_false_alarms=1., onset_max_error_steps_held_only=30., onset_false_alarms_held_only=0.)
    assert numbers([row("phrase", None, 8)])["onset_max_error_steps"] == 30
    with pytest.raises(SystemExit, match="words seed 3: never in 30 % of the completions"): numbers([row("phrase", 12, 8), row("words", None, None)])


def test_programs_that_measure_different_numbers_share_a_file(tmp_path):
    "One adds to what the other wrote; each number knows its date and commit"
    merge(tmp_path, "training", dict(onset_false_alarms=0.), clean=20)
    merge(tmp_path, "training", dict(resume_identical=11.), kills=11)
    assert read_json(tmp_path / "training.json") == dict(onset_false_alarms=0., resume_identical=11.)
    env = read_json(tmp_path / "training_env.json")
    assert env["onset_false_alarms"]["clean"] == 20 and env["resume_identical"]["kills"] == 11 and all({"date", "commit"} <= set(e) for e in env.values())
