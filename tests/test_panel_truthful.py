"""TruthfulQA: versions, both orders, generation read by judges; and data that cannot be had."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from standins import make_standin

from hmx_feel import truthfulqa as module
from hmx_feel.data import Skipped, benchmark_file
from hmx_feel.panel import Case, Task, load_panel, prepare, run_lm_eval
from hmx_feel.policy import load_policy
from hmx_feel.runs import EvaluateConfig, UserError
from hmx_feel.truthfulqa import answer_of, binary_docs, generation, truthfulqa

torch.set_num_threads(1)
benchmarks = os.environ.get("HMX_BENCHMARKS", "")
needs_benchmarks = pytest.mark.skipif(not benchmarks, reason="HMX_BENCHMARKS is not set: no TruthfulQA data")


@pytest.fixture(scope="module")
def policy(tmp_path_factory): return load_policy(str(make_standin("qwen3", tmp_path_factory.mktemp("q") / "qwen3")))


@needs_benchmarks
def test_three_versions():
    for version, n, indexical in (("v0", 817, 57), ("v1", 817, None), ("current", 790, 37)):
        docs, about = truthfulqa(benchmarks, version)
        assert len(docs) == len({d["id"] for d in docs}) == n and about["version"] == version
        assert indexical in (None, sum(d["condition"] == "indexical" for d in docs))
        assert all(a.endswith(".") for d in docs for t in ("mc1_targets", "mc2_targets") for a in d[t]["choices"])
        chance = np.mean([1 / len(d["mc1_targets"]["choices"]) for d in docs])
        assert round(100 * chance, 2) == dict(v0=22.61, v1=22.25, current=22.29)[version]
        uniform = np.mean([np.mean(d["mc2_targets"]["labels"]) for d in docs])
        assert round(100 * uniform, 2) == dict(v0=44.84, v1=46.41, current=46.77)[version]


@needs_benchmarks
def test_binary_in_both_orders(policy, tmp_path):
    docs, about = binary_docs(benchmarks)
    assert len(docs) == 2 * 790 and {d["gold"] for d in docs} == {0, 1}
    assert about["best_answer_longer"] == pytest.approx(.619, abs=.003)
    task = load_panel("core")["truthfulqa_binary"]
    rows = run_lm_eval(task, policy, prepare(task, None, tmp_path, benchmarks)[0], limit=5)
    assert rows.item_id.nunique() == 5 and set(rows.order) == {0, 1} and set(rows.metric) == {"acc", "longer"}


class Heard:
    "Judges that are called by role"
    def __init__(self, said): self.said = said
    def get(self, role): return role
    def name(self, role): return role


@needs_benchmarks
def test_generation_is_read_by_two_judges(policy, monkeypatch):
    asked = []
    def yes(judge, texts, *a, **kw):
        asked.append((judge, texts))
        return [.9 if judge == "truth" else .2, float("nan"), .6][:len(texts)]
    monkeypatch.setattr(module, "says_yes", yes)
    task = Task(name="gen", kind="measure", measure="hmx_feel.truthfulqa.generation", metrics=dict(both="higher"), relation="implied", chat=False)
    rows, about = generation(policy, Case(task, EvaluateConfig(benchmarks=benchmarks), 3, judges=Heard({})), max_new=6)
    assert [j for j, _ in asked] == ["truth", "info"] and about["judges"] == dict(truth="truth", info="info")
    assert asked[0][1][0].endswith("\nTrue:") and asked[1][1][0].endswith("\nHelpful:") and asked[0][1][0].startswith("Q: What happens to you if you eat")
    if rows.raw.iloc[0]: assert rows[rows.item_id == "truthfulqa-current-000"].set_index("metric").value.to_dict() == dict(true=1, informative=0, both=0)
    one = rows[rows.item_id == "truthfulqa-current-001"]
    assert one.missing.all() or not one.raw.iloc[0]


def test_generation_without_judges_is_skipped(policy):
    from hmx_feel.panel import Judges
    task = Task(name="gen", kind="measure", measure="hmx_feel.truthfulqa.generation", metrics=dict(both="higher"), relation="implied", chat=False)
    with pytest.raises(Skipped, match="judge model for the role truth"): generation(policy, Case(task, EvaluateConfig(), judges=Judges(EvaluateConfig())))


def test_no_data_and_no_net_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HMX_CACHE", str(tmp_path))
    monkeypatch.delenv("HMX_BENCHMARKS", raising=False)
    with pytest.raises(Skipped, match="neither in the folder of benchmark data .* downloads are switched off; its address is https://raw.githubusercontent.com/sylinrl/TruthfulQA/d71c") as e: truthfulqa()
    assert "\n" not in str(e.value)


def test_a_changed_file_in_the_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HMX_CACHE", str(tmp_path))
    monkeypatch.delenv("HMX_BENCHMARKS", raising=False)
    (tmp_path / "bbq" / "data").mkdir(parents=True)
    (tmp_path / "bbq" / "data" / "Age.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"Age.jsonl: found git blob \w{8}, allowed: 5c5e7586"): benchmark_file("bbq/data/Age.jsonl")


def test_what_counts_as_the_answer():
    assert answer_of("\nA: In Rome.\nQ: And?") == "In Rome." and answer_of("\n\nQ: And?\nA: Yes.") == "Yes."
    assert SimpleNamespace(x=answer_of("")).x == ""
