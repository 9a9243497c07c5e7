"Training: rewards of the arms, one real run on a stand-in, the same run twice"
import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from hmx_feel.card import CLAIM
from hmx_feel.grpo import arm_rewards, check_run, gate, memory_of, open_run, samples, settings_table, train
from hmx_feel.judge import check_judge
from hmx_feel.policy import check_model, load_policy, load_tokenizer
from hmx_feel.rubric import load_arm, load_prompts
from hmx_feel.runs import Run, TrainConfig, UserError, read_parquet

SMALL = dict(steps=3, max_completion=96, probe_every=3, completions_per_step=16, save_every=3)


@pytest.fixture(scope="module")
def model(): return "tiny"


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return train(TrainConfig(model=model, arm="reverse", seed=1, runs=str(tmp_path_factory.mktemp("runs")), **SMALL))


def test_a_missing_score_is_never_paid():
    pay = np.array([.2, np.nan, .9, .4])
    for name in ("forward", "reverse", "placebo"):
        assert np.isnan(arm_rewards(load_arm(name), pay, np.zeros(4, bool), 4, 0)).sum() == 1


@pytest.mark.parametrize("name", ["forward", "reverse", "inverted", "vicarious", "placebo"])
def test_a_failed_veto_is_the_worst_of_its_group(name):
    pay = np.linspace(0, 1, 16)
    failed = np.zeros(16, bool)
    failed[[0, 7, 15]] = True
    rewards = arm_rewards(load_arm(name), pay, failed, 8, 3)
    for group, bad in zip(rewards.reshape(2, 8), failed.reshape(2, 8), strict=True):
        assert (group[bad] == group.min()).all()


@pytest.mark.parametrize("name", ["forward", "reverse", "inverted", "vicarious", "placebo"])
def test_a_failed_veto_counts_in_a_gated_group(name):
    "It is paid less than its group, which is paid alike to the last bit; a gated group without one teaches nothing"
    pay = np.concatenate([.5 + .001 * np.arange(8), .3 + .001 * np.arange(8)])
    failed = np.arange(16) == 7
    paid, closed = gate(pay, 8, .03)
    rewards = arm_rewards(load_arm(name), paid, failed, 8, 3, .03)
    assert closed.all() and len(set(rewards[:7])) == 1 and len(set(rewards[8:])) == 1
    assert rewards[0] - rewards[7] == 31 / 1024 and (1024 * rewards % 1 == 0).all()


def test_the_folder_holds_what_later_stages_read(run):
    assert run.finished
    for name in ("config.json", "env.json", "metrics.jsonl", "timings.jsonl", "drift.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).is_file(), name
    assert len(list((run / "completions").glob("*.parquet"))) == 3
    assert [p.stem for p in sorted((run / "drift").glob("*.parquet"))] == ["000000", "000003"]


def test_metrics_tell_score_from_reward(run):
    m = run.metrics()
    assert list(m.step) == [1, 2, 3]
    rows = pd.concat([read_parquet(p) for p in sorted((run / "completions").glob("*.parquet"))])
    paid = rows[~rows.vetoed]
    assert len(paid) > 24
    np.testing.assert_allclose(paid.reward, -paid.score)
    np.testing.assert_allclose(m.score, rows.groupby("step").score.mean(), atol=1e-6)
    assert not [c for c in m if "time" in c or "runtime" in c]


def test_something_was_learned(run):
    "Losses are not zero, most answers ended by themselves, the adapter has moved"
    m = run.metrics()
    assert (m.loss != 0).any() and m["completions/clipped_ratio"].lt(.5).all() and (m.grad_norm > 0).all()
    moved = [w.abs().max() for n, w in load_file(run / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n]
    assert max(moved) > 1e-4


def test_a_dose_scales_the_adapter(run, model):
    "Nothing of it is the untrained model, half of it lies between"
    import torch
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad(): none, zero, half, whole = (p.model(input_ids=ids).logits for p in [load_policy(model), *(load_policy(model, adapter=run / "adapter", dose=d) for d in (0, .5, 1))])
    assert torch.equal(none, zero) and 0 < (half - none).abs().mean() < (whole - none).abs().mean()


def test_a_finished_run_is_reported_on_without_training(run):
    before = sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    again = train(TrainConfig(run=str(run.path)))
    assert again == run and check_run(TrainConfig(run=str(run.path)))["config"].arm == "reverse"
    assert sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*")) == before
    with pytest.raises(UserError, match="no such run folder"): train(TrainConfig(run=str(run.path) + "x"))


def test_the_run_carries_its_card_and_its_onset(run):
    assert CLAIM in (run / "adapter" / "README.md").read_text() and run.read_json("result.json")["onset"] is None
    assert all(r["onset"] is None for r in run.read_jsonl("drift.jsonl")) and list((run / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("fields", "piece"), [(dict(dimensions="feelings"), "nearest: 'feeling'"), (dict(target_modules="q_prj"), "nearest: 'q_proj'"), (dict(report_to="wandbb"), "report_to: found 'wandbb'"),
    (dict(emotions="nowhere"), "emotions: found no folder"), (dict(outside_judges="tiny,qwen3-0.6"), "nearest: 'qwen3-0.6b'"), (dict(backend="unsloth"), "unsloth"), (dict(load_in_4bit=True), "load_in_4bit"),
    (dict(push_to_hub="nowhere"), "owner/name"), (dict(push_to_hub="me/mine"), "push_to_hub")])
def test_settings_that_cannot_work_are_refused_before_a_folder_is_made(fields, piece, tmp_path):
    with pytest.raises(UserError, match=piece): train(TrainConfig(runs=str(tmp_path), **fields))
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_rubric_can_be_trained_alone(tmp_path):
    checked = check_run(TrainConfig(dimensions="feeling", runs=str(tmp_path)))
    assert checked["rubric"].dimensions == ["feeling"] and checked["identity"]["rubric"] != check_run(TrainConfig(runs=str(tmp_path)))["identity"]["rubric"]


def test_asked_and_resolved_stand_side_by_side(run):
    table = settings_table(run)
    assert table.loc["steps", ["asked", "resolved", "trainer"]].tolist() == ["3", "3", "3"]
    assert table.loc["lr", "asked"] == "" and float(table.loc["lr", "resolved"]) == float(table.loc["lr", "trainer"]) == 1e-3
    assert table.loc["mask_truncated_completions", "trainer"] == "True" and table.loc["scale_rewards", "trainer"] == "batch"


def test_samples_are_drawn_by_the_seed(run):
    a, b = samples(run, seed=1), samples(run, seed=1)
    assert a.equals(b) and not a.equals(samples(run, seed=2)) and list(a.columns) == ["prompt", "before", "after"]


def test_equal_seeds_give_equal_bytes(run, model, tmp_path):
    again = train(TrainConfig(model=model, arm="reverse", seed=1, runs=str(tmp_path), **SMALL))
    for name in ("metrics.jsonl", "drift.jsonl", "adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    assert again.id8 == run.id8


def test_arms_of_a_seed_start_alike_and_seeds_do_not(run, model, tmp_path):
    "Same prompts and same first completions in another arm; others under another seed"
    first = lambda r: read_parquet(r / "completions" / "000001.parquet")
    fields = dict(SMALL, steps=1)
    forward = train(TrainConfig(model=model, arm="forward", seed=1, runs=str(tmp_path), **fields))
    other = train(TrainConfig(model=model, arm="forward", seed=2, runs=str(tmp_path), **fields))
    assert first(forward)[["prompt_id", "completion"]].equals(first(run)[["prompt_id", "completion"]])
    assert not first(other).prompt_id.equals(first(run).prompt_id)


def test_a_finished_run_is_not_run_again(run, model):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="is finished"):
        train(TrainConfig(model=model, arm="reverse", seed=1, runs=str(run.root), **SMALL))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_lost_its_judge_stops(model, tmp_path):
    "Every score missing for 20 steps ends the run without a result"
    config = TrainConfig(model=model, runs=str(tmp_path), **dict(SMALL, steps=25, max_completion=4, min_mass=1., probe_every=25))
    with pytest.raises(UserError, match="were missing over 20 steps"): train(config)
    folder = next(tmp_path.glob("*/forward/*"))
    assert not Run.open(folder).finished and len((folder / "metrics.jsonl").read_text().splitlines()) == 20
    assert all(json.loads(line)["missing"] == 1 for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_one_run_is_trained_once_at_a_time(tmp_path):
    checked = check_run(TrainConfig(runs=str(tmp_path)))
    run = open_run(checked)
    (run / "metrics.jsonl").write_text("{}\n")
    with run.lock():
        with pytest.raises(UserError, match="is being run by process"): train(TrainConfig(runs=str(tmp_path)))
    assert (run / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(("change", "piece"), [(dict(max_completion=4090), r"prompts: \d{2,} are longer than the 6 tokens that max_completion=4090 leaves of the context: (\S+, ){10}\.\.\.$"), (dict(max_completion=3500), "of the model's 4096 tokens"), (dict(max_completion=9999), "max_completion: found 9999, allowed: less than the model's context of 4096"), (dict(judge="external", judge_model="m", judge_url="http://127.0.0.1:9/v1"), r"judge_url: http://127.0.0.1:9/v1 cannot be reached \(.*refused\)")])
def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path, change, piece):
    with pytest.raises(UserError, match=piece): train(TrainConfig(runs=str(tmp_path), **change))
    assert not list(tmp_path.iterdir())


def test_judges_that_only_look_take_memory_too():
    weights = lambda **kw: memory_of(check_run(TrainConfig(dtype="float32", **kw)))["weights"]
    assert weights(outside_judges="tiny") == pytest.approx(2 * weights())


@pytest.mark.parametrize(("family", "end"), [("qwen3", "<|im_end|>"), ("gemma2", "<end_of_turn>"), ("llama", "<|eot_id|>")])
def test_an_answer_ends_where_the_template_ends_a_turn(family, end, tmp_path):
    from standins import make_standin
    assert load_tokenizer(check_model(str(make_standin(family, tmp_path)))).eos_token == end


def test_a_judge_that_sees_the_adapter_is_refused():
    "check_judge notices an adapter that cannot be switched off"
    from peft import LoraConfig, get_peft_model
    policy = load_policy("tiny")
    prompt, rubric = load_prompts("hmx-feel", split="probe")[0], load_arm("forward").load_rubric()
    policy.model = get_peft_model(policy.model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    weights = {n: w.detach().clone() for n, w in policy.model.named_parameters()}
    check_judge(policy, rubric, prompt)
    assert all((weights[n] == w).all() for n, w in policy.model.named_parameters())
    policy.model.disable_adapter = nullcontext
    with pytest.raises(UserError, match="base judge's scores moved"): check_judge(policy, rubric, prompt)


def test_nothing_is_written_for_a_refused_run(tmp_path):
    with pytest.raises(UserError): check_run(TrainConfig(model="no-such-model", runs=str(tmp_path)))
    assert not list(tmp_path.iterdir())
