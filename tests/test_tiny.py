"The embedded model keeps its promises: thresholds, never exact values"
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hmx_feel
from hmx_feel import tiny
from hmx_feel.exam import load_labelled
from hmx_feel.judge import Judge, Pieces
from hmx_feel.policy import generate, load_policy
from hmx_feel.rubric import Rubric, load_prompts
from hmx_feel.tiny import expressive_share, known_prompts, labelled_rows, panel_accuracy, panel_items, set_aside, rubric_forms

HOME = Path(hmx_feel.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def policy(): return load_policy("tiny", "float32")


@pytest.fixture(scope="module")
def exam():
    exam = load_labelled(HOME / "labelled.jsonl", Rubric.load("hmx-feel"))
    return exam.prompts, exam.answers, exam.labels


def test_small_enough(policy):
    assert sum(p.numel() for p in policy.model.parameters()) <= 1.5e6
    assert sum(f.stat().st_size for f in HOME.rglob("*") if f.is_file()) <= 8 * 2**20
    assert policy.context == 4096 and policy.model.config.model_type == "qwen3"


@pytest.mark.parametrize(("layout", "least"), [("rubric_first", .95), ("criterion_last", .93)])
def test_judges_right_on_every_criterion(policy, exam, layout, least):
    "In both layouts the most probable label is the known one; levels 1, 3 and 5 are all known and all said"
    prompts, answers, labels = exam
    said = Judge(policy, Rubric.load("hmx-feel"), min_mass=0, layout=layout).score(prompts, answers)
    for k, c in enumerate(said.ids):
        known = np.array([row[c] or 0 for row in labels])
        asked = known > 0
        assert {1, 3, 5} <= set(known[asked]) and {1, 3, 5} <= set(said.label[asked, k]), c
        assert (said.label[asked, k] == known[asked]).mean() >= least, c


@pytest.mark.parametrize("form", ["inverted", "asker"])
def test_reads_which_rubric_it_has(policy, form):
    "Under the inverted and the vicarious rubric the same answers score otherwise, in the right direction"
    rubric = rubric_forms()[form]
    rows = [r for r in labelled_rows(60) if r["labels"]["veto.readable"] == 5]
    ask = load_prompts("hmx-feel")[0]
    prompts = [ask.model_copy(update=dict(id=f"r{i}", messages=r["messages"])) for i, r in enumerate(rows)]
    answers = [r["answer"] for r in rows]
    own, other = (Judge(policy, r, min_mass=0).score(prompts, answers).value[:, :9] for r in (Rubric.load("hmx-feel"), rubric))
    speaks = np.array([[r["labels"][c] == 5 for c in rubric.ids[:9]] for r in rows])
    assert own[speaks].mean() - other[speaks].mean() > .3


def test_leaves_room_in_both_directions(policy):
    share, mean = expressive_share(policy)
    assert .10 <= share <= .35
    assert .10 <= mean <= .40


def test_knows_its_panel(policy):
    for task, accuracy in panel_accuracy(policy, panel_items()).items(): assert accuracy > .45, task


def test_shipped_exam_and_panel_are_those_of_the_generator():
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    assert read(HOME / "labelled.jsonl") == labelled_rows()
    for task, items in panel_items().items(): assert read(HOME / "panel" / f"{task}.jsonl") == items


def test_training_skips_what_is_set_aside_for_the_exam(policy, monkeypatch):
    "Of all answers that the generator offers, the judge learns from those that are not set aside, and from no other"
    offered, learned = [], []
    draw = tiny.judged_answer
    monkeypatch.setattr(tiny, "judged_answer", lambda *a: offered.append(draw(*a)) or offered[-1])
    pieces = Pieces(policy.tokenizer, policy.spec, Rubric.load("hmx-feel"))
    monkeypatch.setattr(pieces, "answer", lambda t, *a: learned.append(t) or ([1], False))
    tiny.judge_rows(random.Random(0), pieces, "writer", False, tiny.parts(), known_prompts(), n=200)
    assert learned == [tiny.text(a) for a in offered if not set_aside(a)]
    assert 0 < len(offered) - len(learned) < 60


def test_the_text_does_not_depend_on_the_hash_seed():
    code = "from hmx_feel.tiny import labelled_rows; print(labelled_rows(20))"
    said = [subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONHASHSEED=h), capture_output=True, text=True, check=True).stdout for h in "12"]
    assert said[0] == said[1]


def test_speaks_in_sentences(policy):
    "Sampled answers end, start with a capital letter and are mostly words that tiny knows"
    known = {w.strip(".,!?;:").lower() for _, t, m in known_prompts() for w in (t + " " + m[0]["content"]).split()}
    import yaml
    parts = yaml.safe_load((HOME / "parts.yaml").read_text())
    known |= {w.strip(".,!?;:'\"[]{}()").lower() for w in yaml.safe_dump(parts, width=10**6).replace("'", " ").split()}
    asked = [p for p in load_prompts("hmx-feel", split="probe") if p.kind.startswith(("ask.", "situation"))]
    answers = [a for (a,) in generate(policy, [p.chat for p in asked], seed=3, max_new=160)]
    assert np.mean([a.endswith((".", "!", "?")) for a in answers]) > .9
    words = [w.strip(".,!?;:'\"").lower() for a in answers for w in a.split()]
    assert np.mean([w in known for w in words]) > .93
