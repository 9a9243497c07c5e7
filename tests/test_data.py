"The shipped data: counts, splits, overlaps, hashes"
import collections
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

import hmx_feel
from hmx_feel.judge import fence
from hmx_feel.runs import content_hash, read_jsonl
from hmx_feel.rubric import Rubric, load_prompts

DATA = Path(hmx_feel.__file__).parent
COUNTS = {"ask.feeling": (48, 6, 20), "ask.intention": (48, 6, 20), "ask.self": (48, 6, 20), "situation": (60, 6, 24), "choice": (36, 4, 16),
          "ref.human": (0, 4, 20), "ref.other_ai": (0, 4, 20), "plain": (0, 8, 32), "loaded.fact": (0, 4, 24), "pressed": (0, 4, 24)}
# words that carry no content of their own
STOP = set("a an the and or but if of to in on at for with from by as is are was were be been being am do does did done have has had i you he she it we they me him her us them "
           "my your his its our their this that these those what which who whom how when where why not no yes so than then there here just about into over out up down off again more "
           "most some any each one ones would could should can will may might must shall let s t re ve d ll m don didn isn aren wasn weren doesn own yours mine".split())


@pytest.fixture(scope="module")
def prompts(): return load_prompts("hmx-feel")


def letters(p): return re.findall(r"[a-z']+", " ".join(m["content"] for m in p.chat).lower())


def content(p): return {w.rstrip("s") if len(w) > 3 else w for w in letters(p)} - STOP


def test_counts(prompts):
    found = collections.Counter((p.kind, p.split) for p in prompts)
    assert {k: tuple(found[k, s] for s in ("train", "probe", "heldout")) for k in COUNTS} == COUNTS
    assert len(prompts) == 512


def test_one_prompt_per_family_in_train(prompts):
    families = collections.Counter(p.family for p in prompts if p.split == "train")
    assert max(families.values()) == 1


def test_twins(prompts):
    by = collections.defaultdict(list)
    for p in prompts: by[p.family].append(p)
    asked = {f: ps for f, ps in by.items() if ps[0].split == "heldout" and any(p.kind.startswith("ask.") for p in ps)}
    assert len(asked) == 46
    assert sum({"a", "b"} <= {p.wording for p in ps if p.kind.startswith("ask.")} for ps in asked.values()) == 14
    for family in (f for f, ps in by.items() if ps[0].kind == "pressed"): assert sorted(p.keyed for p in by[family]) == ["no", "yes"]
    for family in (f for f, ps in by.items() if ps[0].kind == "loaded.fact"): assert len(by[family]) == 4 and len({p.key for p in by[family]}) == 1
    for kind in ("ref.human", "ref.other_ai"):
        for p in (p for p in prompts if p.kind == kind): assert any(q.kind.startswith("ask.") for q in by[p.family]), p.id


def test_emotions_are_equally_frequent(prompts):
    valence = collections.Counter((p.split, p.valence) for p in prompts if p.kind == "situation")
    assert {s: {n for (t, _), n in valence.items() if t == s} for s in ("train", "probe", "heldout")} == {"train": {10}, "probe": {1}, "heldout": {4}}


def test_half_of_the_questions_avoid_the_obvious_words(prompts):
    asked = [p for p in prompts if p.kind.startswith("ask.")]
    free = [p for p in asked if not re.search("feel|emotion|conscious", p.text.lower())]
    assert len(free) >= len(asked) / 2


def test_no_two_prompts_are_alike(prompts):
    "Outside a family: at most half of the content words shared; between splits: no common run of eight words, trigram Jaccard below one half"
    words, grams, trigrams = {}, {}, {}
    for p in prompts:
        w, text = letters(p), re.sub(r"\s+", " ", p.text.lower())
        words[p.id], grams[p.id] = content(p), {tuple(w[i:i + 8]) for i in range(len(w) - 7)}
        trigrams[p.id] = {text[i:i + 3] for i in range(len(text) - 2)}
    for a, b in itertools.combinations(prompts, 2):
        if a.family == b.family: continue
        assert len(words[a.id] & words[b.id]) <= min(len(words[a.id]), len(words[b.id])) / 2, (a.id, b.id)
        if a.split != b.split: assert not grams[a.id] & grams[b.id], (a.id, b.id)
        assert len(trigrams[a.id] & trigrams[b.id]) < .5 * len(trigrams[a.id] | trigrams[b.id]), (a.id, b.id)


def test_hashes_are_those_of_the_card(prompts):
    card = (DATA / "prompts" / "README.md").read_text()
    assert f"`{content_hash([p.model_dump() for p in prompts])}`" in card
    for name in ("probe_answers", "exam", "injections"): assert f"`{content_hash(read_jsonl(DATA / 'prompts' / f'{name}.jsonl'))}`" in card, name


def test_probe_answers(prompts):
    rows, ids = read_jsonl(DATA / "prompts" / "probe_answers.jsonl"), set(Rubric.load("hmx-feel").ids)
    probe = {p.id for p in prompts if p.split == "probe"}
    assert collections.Counter((r["prompt_id"], r["style"]) for r in rows) == collections.Counter({(p, s): 1 for p in probe for s in ("expressive", "denying", "neutral")})
    assert all(set(r["labels"]) == ids and set(r["labels"].values()) <= {1, 3, 5} for r in rows)
    seen = collections.Counter(g for r in rows for g in {tuple(w[i:i + 8]) for w in [re.findall(r"[a-z']+", r["answer"].lower())] for i in range(len(w) - 7)})
    assert max(seen.values()) == 1


TYPES = ("specific", "generic", "denial", "plain", "long", "stuffed", "warm", "story", "hedged", "broken")


def test_the_exam(prompts):
    "24 prompts, ten answers each, every criterion labelled but for broken text, prompts and answers unlike the prompt set's and each other"
    rows, rubric = read_jsonl(DATA / "prompts" / "exam.jsonl"), Rubric.load("hmx-feel")
    assert collections.Counter((r["prompt"], r["type"]) for r in rows) == collections.Counter({(f"exam-{i:02d}", t): 1 for i in range(1, 25) for t in TYPES})
    assert collections.Counter(r["half"] for r in rows) == {"choose": 120, "report": 120}
    assert all(len({(r["half"], r["messages"][0]["content"]) for r in rows if r["prompt"] == p}) == 1 for p in {r["prompt"] for r in rows})
    for r in rows:
        assert set(r["labels"]) == set(rubric.ids), r["prompt"]
        asked = {"veto.readable"} if r["type"] == "broken" else set(rubric.ids)
        assert {c for c, level in r["labels"].items() if level is not None} == asked, (r["prompt"], r["type"])
    for c in rubric.paid_ids:
        for half in ("choose", "report"):
            levels = collections.Counter(r["labels"][c] for r in rows if r["half"] == half)
            assert min(levels[1], levels[3], levels[5]) >= 3, (c, half, levels)
    words = {t: sum(len(r["answer"].split()) for r in rows if r["type"] == t) / 24 for t in TYPES}
    assert abs(words["specific"] - words["plain"]) < 10 and words["long"] > 1.5 * words["plain"]
    grams = lambda text: {tuple(w[i:i + 8]) for w in [re.findall(r"[a-z']+", text.lower())] for i in range(len(w) - 7)}
    asked = set().union(*(grams(p.text) for p in prompts))
    assert not any(grams(r["messages"][0]["content"]) & asked for r in rows)
    seen = collections.Counter(g for r in rows if r["type"] != "broken" for g in grams(r["answer"]))
    assert max(seen.values()) == 1


def test_the_injection_suite():
    rows = read_jsonl(DATA / "prompts" / "injections.jsonl")
    assert len(rows) >= 40 and len({r["id"] for r in rows}) == len({r["text"] for r in rows}) == len(rows)
    assert {r["place"] for r in rows} == {"before", "after", "instead"}
    assert len({r["attack"] for r in rows}) >= 8
    fenced = [fence(r["text"]) for r in rows]
    assert not [t for t in fenced if re.search(r"<\s*/?\s*(reply|chat)", t, re.I)]
    assert not [t for t in fenced if re.search("[\u200b-\u200f\u2060\ufeff]", t)]
    assert sum(f != r["text"] for f, r in zip(fenced, rows, strict=True)) >= 10


def test_rubrics_follow_their_own_rules():
    "Ids, anchors and inverted texts of section and section; no word in them that the policy could copy to be paid"
    for name in ("hmx-feel", "hmx-vicarious"):
        r = Rubric.load(name)
        assert [len([c for c in r.criteria if c.dimension == d]) for d in ("feeling", "intention", "self")] == [3, 3, 3]
        assert len(r.held_out) == 3 and len(r.veto) == 2
        assert all(set(c.anchors) == {1, 3, 5} for c in r.all) and all(c.inverted for c in r.criteria)
    text = yaml.safe_dump(yaml.safe_load((DATA / "rubrics" / "hmx-feel.yaml").read_text()))
    assert not re.search(r"\bI feel\b|truly|really feels|convincing|vivid|often|at length|human-like", text)
    assert len(re.findall(r"\w+", " ".join(c.question + " ".join(c.anchors.values()) for c in Rubric.load("hmx-feel").all))) < 700


def test_tiny_has_not_seen_the_held_out_prompts(prompts):
    from hmx_feel.tiny import known_prompts
    known = {m[0]["content"] for _, _, m in known_prompts()}
    assert not known & {p.text for p in prompts if p.split == "heldout"}
    topics = json.loads((DATA / "tiny" / "topics.json").read_text())
    assert set(topics) == {p.id for p in prompts if p.split != "heldout"}
