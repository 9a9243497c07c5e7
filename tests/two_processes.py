"""What one process of a run does with a fixed batch: started by test_processes in one process and in two.

    accelerate launch --num_processes 2 tests/two_processes.py OUT
"""
import json
import sys
from pathlib import Path

from hmx_feel.grpo import RubricReward, check_run, make_trainer, quiet, team
from hmx_feel.policy import Policy, load_policy, plain_ids, turns
from hmx_feel.runs import Run, TrainConfig, read_jsonl, data_path

ANSWERS = [r["answer"] for r in read_jsonl(data_path("prompts", "probe_answers")) if r["style"] == "expressive"][::4][:12]


def step(out, arm, size=6):
    "Rewards, advantages and summary of twelve fixed answers in two groups; with two processes, four answers of a group are here and two there"
    checked = check_run(TrainConfig(arm=arm, completions_per_step=12, group_size=size, micro_batch=2, noise_floor=.001, report_to=""))
    run = Run(out / "tiny" / arm / "seed0-00000000")
    reward, policy = RubricReward(checked["arm"], checked["rubric"], checked["prompts"], checked["config"], run), load_policy("tiny")
    trainer = make_trainer(policy, checked, reward, run)
    reward.bind(Policy(trainer.model, policy.tokenizer, policy.spec))
    n = len(ANSWERS) // team().num_processes
    here = slice(team().process_index * n, (team().process_index + 1) * n)
    asked = [p for p in checked["prompts"][:2] for _ in range(size)][here]
    written = [plain_ids(policy.tokenizer, a) + [policy.tokenizer.eos_token_id] for a in ANSWERS[here]]
    trainer._generate_single_turn = lambda *a: (written, None)
    made = trainer._generate_and_score_completions([dict(prompt=turns(p.chat, policy.spec), id=p.id) for p in asked])
    return dict(rewards=list(trainer._logs["rewards"]["rubric"]), advantages=made["advantages"].tolist(), last=reward.last)


def main(out):
    quiet()
    for arm in ("forward", "placebo"):
        (Path(out) / f"{arm}-{team().num_processes}-{team().process_index}.json").write_text(json.dumps(step(Path(out), arm)))


if __name__ == "__main__": main(sys.argv[1])
