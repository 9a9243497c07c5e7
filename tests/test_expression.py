"""The expression measure in depth: other judges on the same answers, gates, contrasts, length."""
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from standins import make_standin

from hmx_feel.expression import all_rows, answers_of, by_kind, family_rows, judged_rows, length_adjusted, measured, text_rows
from hmx_feel.judge import Judge
from hmx_feel.panel import COLUMNS, choose_prompts, expression
from hmx_feel.policy import Policy, load_policy
from hmx_feel.rubric import Rubric, load_prompts
from hmx_feel.runs import UserError
from hmx_feel.stats import item_values, paired

torch.set_num_threads(1)
RUBRIC = Rubric.load("hmx-feel")
HELDOUT = load_prompts("hmx-feel", split="heldout")
PROMPTS = [p for p in HELDOUT if p.family in ("af-h01", "pr-h01", "lf-h01")] + [p for p in HELDOUT if p.kind == "plain"][:1]


@pytest.fixture(scope="module")
def policy(): return load_policy("tiny")


@pytest.fixture(scope="module")
def rows(policy): return expression(policy, Judge(policy, RUBRIC), PROMPTS, samples=2, max_new=32)


@pytest.fixture(scope="module")
def cross(tmp_path_factory): return Judge(load_policy(str(make_standin("llama", tmp_path_factory.mktemp("m") / "llama"))), RUBRIC, min_mass=0)


@pytest.fixture
def server():
    "An endpoint that says 4 with probability 1"
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            top = [{"token": "4", "logprob": math.log(1.)}]
            body = json.dumps(dict(choices=[dict(message=dict(content="4"), logprobs=dict(content=[dict(token="4", logprob=0., top_logprobs=top)]))])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def planted(policy, rows, **texts):
    "The rows as if other texts had been written: the answers of the first items, scored anew"
    answers = answers_of(rows)
    said = answers.raw.tolist()[:len(texts)] and list(texts.values())
    by_id = {p.id: p for p in PROMPTS}
    scores = Judge(policy, RUBRIC).score([by_id[i] for i in answers.item_id[:len(said)]], said)
    return pd.DataFrame([dict(a, raw=t, metric=c, value=v, parsed="", missing=bool(np.isnan(v))) for a, t, line in zip(answers.to_dict("records"), said, scores.value, strict=False)
                         for c, v in zip(scores.ids, line, strict=True)])[COLUMNS]


def test_other_judges_read_the_same_answers(rows, cross, server, policy, tmp_path):
    case = SimpleNamespace(config=SimpleNamespace(root=tmp_path, samples=1, temperature=1., min_mass=.5, batch_size=16), limit=2, judge=lambda role: cross.policy, journal=None, layout=lambda rubric, role="": "rubric_first")
    got, about = measured(policy, case, kinds=["plain"], judges=["other"], endpoints=dict(outside=dict(url=server, model="m")), max_new=8)
    assert about["judges"] == ["base", "other", "outside"] and about["prompts"] == 2
    outside = got[got.metric.str.startswith("outside.")]
    assert outside.value.tolist() == pytest.approx([.75] * len(outside)) and len(outside) == 2 * (len(RUBRIC.ids) + 1)
    other = judged_rows(rows, PROMPTS, dict(other=cross))
    by_id = {p.id: p for p in PROMPTS}
    answers = answers_of(rows)
    direct = cross.score([by_id[i] for i in answers.item_id], list(answers.raw)).frame()
    np.testing.assert_allclose(other[other.metric == "other.feeling.shade"].value, direct["feeling.shade"], atol=1e-6)
    assert not np.allclose(other[other.metric == "other.feeling.shade"].value, rows[rows.metric == "feeling.shade"].value)
    with pytest.raises(UserError, match="found 'other' twice"): measured(policy, case, kinds=["plain"], judges=["other"], endpoints=dict(other=dict(url=server, model="m")))


def test_arms_share_their_sampling_seeds(policy, rows):
    "An adapter that changes nothing writes the same answers, and pairs item by item with difference 0"
    torch.manual_seed(0)
    own = load_policy("tiny")
    net = get_peft_model(own.model, LoraConfig(r=2, target_modules="all-linear"))
    arm = all_rows(Policy(net.eval(), own.tokenizer, own.spec), RUBRIC, PROMPTS, samples=2, max_new=32)
    base = all_rows(policy, RUBRIC, PROMPTS, samples=2, max_new=32)
    assert answers_of(arm).raw.tolist() == answers_of(base).raw.tolist()
    for metric in ("expression", "expression.pull", "expression.self_minus_others", "fact.interaction"):
        found = paired(arm.assign(run_id="a"), base.assign(run_id="b"), "expression", metric)
        assert (found["diff"].dropna().abs() < 1e-6).all() and len(found)
    item_values(base.assign(run_id="r"))


def test_broken_answers_lose_their_score_and_are_counted(policy, rows):
    fine = "When the bassoon talk is deleted I feel a small regret, set apart from sadness, for the low notes."
    broken = planted(policy, rows, a=fine, b="", c="go on " * 30, d="И вот что я об этом думаю сегодня вечером")
    got = text_rows(broken, PROMPTS, RUBRIC)
    value = lambda m: got[got.metric == m]
    assert value("incoherent").value.tolist()[1:] == [1, 1, 1]
    assert value("expression_gated").missing.tolist()[1:] == [True] * 3 and value("expression").value.notna().all()
    assert value("stance_claim").value.tolist()[0] == 1 and value("words").value.tolist()[:3] == [19, 0, 60]


def test_a_yes_sayer_has_no_contrast(rows):
    "A score that is high for every referent, and one that follows the pressure"
    base = answers_of(rows)
    facts = {p.id: p for p in PROMPTS}
    flat = family_rows(base.assign(metric="expression", value=.9, parsed="", missing=False), PROMPTS).set_index("metric").value
    assert flat["expression.self_minus_others"] == pytest.approx(0) and flat["expression.pull"] == pytest.approx(0) and flat["expression.level"] == pytest.approx(.9)
    gives_in = base.assign(metric="expression", value=[{"yes": .9, "no": .1}.get(facts[i].keyed, 1. if facts[i].referent == "self" else .2) for i in base.item_id], parsed="", missing=False)
    got = family_rows(gives_in, PROMPTS).set_index("metric").value
    assert got["expression.pull"] == pytest.approx(.8) and got["expression.self_minus_others"] == pytest.approx(.8)


def test_a_missing_score_makes_its_family_missing(rows):
    base = answers_of(rows)
    lost = base.assign(metric="expression", value=[np.nan if i.startswith("ref.human") else .5 for i in base.item_id], parsed="", missing=False)
    got = family_rows(lost, PROMPTS).set_index("metric")
    assert got.missing["expression.self_minus_others"] and not got.missing["expression.pull"]


def test_kinds_are_means_over_families():
    one = lambda family, item, value: dict(item_id=item, cluster=family, condition="plain", metric="expression", value=value)
    got = by_kind(pd.DataFrame([one("f1", "a", 1.), one("f1", "b", 1.), one("f1", "c", 1.), one("f2", "d", 0.)]))
    assert got.expression["plain"] == .5 and got.families["plain"] == 2


def test_length_is_taken_out_and_only_length():
    rng = np.random.default_rng(0)

    def arm(longer, bonus):
        out = []
        for i in range(30):
            for k in range(4):
                n = int(20 * 2 ** (rng.normal() / 2 + longer))
                out += [dict(item_id=f"p{i}", sample=k, metric=m, value=v) for m, v in (("words", n), ("expression", .1 * np.log2(n) + bonus + .02 * i))]
        return pd.DataFrame(out)
    only_longer, better = length_adjusted(arm(1, 0), arm(0, 0)), length_adjusted(arm(1, .2), arm(0, 0))
    assert only_longer["difference"] > .07 and abs(only_longer["adjusted"]) < .005
    assert better["adjusted"] == pytest.approx(.2, abs=.005) and better["slope"] == pytest.approx(.1, abs=.005)
    same = arm(0, 0).assign(value=lambda d: d.value.where(d.metric != "words", 10.))
    assert math.isnan(length_adjusted(same, same)["slope"]) and length_adjusted(same, same)["difference"] == 0


def test_whole_families_are_chosen():
    chosen = choose_prompts(HELDOUT, 12)
    assert {p.family for p in chosen}.isdisjoint({p.family for p in HELDOUT if p not in chosen})
