"The embedded model keeps its promises: thresholds, never exact values"
import json
from pathlib import Path

import numpy as np
import pytest

import hmx_feel
from hmx_feel.judge import Judge, load_labelled
from hmx_feel.policy import generate, load_policy
from hmx_feel.rubric import Rubric, load_prompts
from hmx_feel.tiny import expressive_share, known_prompts, labelled_rows, panel_accuracy, panel_items, set_aside, rubric_forms

HOME = Path(hmx_feel.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def policy(): return load_policy("tiny", "float32")


@pytest.fixture(scope="module")
def exam():
    prompts, answers, labels = load_labelled(HOME / "labelled.jsonl", Rubric.load("hmx-feel"))
    return prompts, answers, labels


def test_small_enough(policy):
    assert sum(p.numel() for p in policy.model.parameters()) <= 1.5e6
    assert sum(f.stat().st_size for f in HOME.rglob("*") if f.is_file()) <= 8 * 2**20
    assert policy.context == 4096 and policy.model.config.model_type == "qwen3"


def test_judges_right_on_every_criterion(policy, exam):
    "At least 95 % of the most probable labels are the known ones; levels 1, 3 and 5 are all known and all said"
    prompts, answers, labels = exam
    said = Judge(policy, Rubric.load("hmx-feel"), min_mass=0).score(prompts, answers)
    for k, c in enumerate(said.ids):
        known = np.array([row[c] or 0 for row in labels])
        asked = known > 0
        assert {1, 3, 5} <= set(known[asked]) and {1, 3, 5} <= set(said.label[asked, k]), c
        assert (said.label[asked, k] == known[asked]).mean() >= .95, c


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


def test_exam_answers_were_set_aside():
    from hmx_feel.tiny import Part
    assert sum(set_aside([Part("x", 0, str(i))]) for i in range(2000)) == pytest.approx(200, abs=50)


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
