"""Unsloth against plain TRL on a GPU: the same models, the same batch, fresh processes that take turns.

    python tests/on_gpu.py OUT [--models qwen3-0.6b,qwen3-4b] [--rounds 1] [--steps 6] [--load-in-4bit] [--smoke]

The models have the real configurations and random weights, and a small tokenizer: fair for speed and memory, never for
quality. Each process loads, proves its judge, trains `steps` steps of 64 completions of 200 tokens that are all held at
their full length, and scores fixed answers with the base and the live judge before and after. Numbers go to OUT/gpu.json,
what they come from to OUT/gpu_details.csv. `--smoke` does the same in small, with TRL alone where there is no GPU.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
GROUPS, EACH, TOKENS = 8, 8, 200


def make_model(name, folder, smoke=False):
    "Random weights in the configuration of a known model, which write tokens of the tokenizer only; returns the folder"
    import torch
    from hmx_feel.backend import SHAPES
    from standins import SIZES, make_tokenizer
    from transformers import AutoModelForCausalLM, Qwen3Config
    tok = make_tokenizer("qwen3")
    shape = dict(SHAPES[name], **(dict(SIZES["small"], vocab_size=2000) if smoke else {}))
    config = Qwen3Config(**{k: v for k, v in shape.items() if k != "model_type"}, max_position_embeddings=40960, rope_theta=1e6,
                         bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device): net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.no_grad():   # one dimension is a bias of the tied output: what the tokenizer cannot read is never written
        rows = net.get_input_embeddings().weight
        rows[:, 0] = .6
        rows[len(tok):, 0] = -.6
    net.generation_config.eos_token_id = tok.eos_token_id
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def one(ask):
    "A process of its own: one model, one backend"
    from hmx_feel.backend import check_backend
    backend = check_backend(ask["backend"])   # Unsloth comes before everything else
    import numpy as np
    import torch
    from hmx_feel.grpo import RubricReward, check_run, load_parts, open_run, quiet
    from hmx_feel.judge import Judge
    from hmx_feel.policy import Policy
    from hmx_feel.runs import TrainConfig, data_path, read_jsonl
    from standins import exactly
    from transformers import TrainerCallback
    quiet()
    cuda = torch.cuda.is_available()
    groups, each, n = ask["shape"]
    asked = TrainConfig(model=ask["model"], runs=ask["runs"], backend=backend, steps=ask["steps"], max_completion=n, group_size=each, completions_per_step=groups * each,
                        micro_batch=ask["micro_batch"], load_in_4bit=ask["load_in_4bit"], noise_floor=0, min_mass=0, max_cut=1, lr=1e-4, warmup_steps=0, token_budget=ask["token_budget"], save_every=10**6, report_to="")
    checked = check_run(asked)
    run = open_run(checked)
    policy, trainer, reward, ledger = load_parts(checked, run)   # with the proof of the judge
    exactly(trainer, policy.tokenizer, n)
    adapted = Policy(trainer.model, policy.tokenizer, policy.spec)
    fixed = [r["answer"] for r in read_jsonl(data_path("prompts", "probe_answers"))][:12]
    look = lambda identity: Judge(adapted, checked["rubric"], identity, min_mass=0).score([checked["prompts"][0]] * len(fixed), fixed).value
    before = {k: look(k) for k in ("base", "live")}

    class Clock(TrainerCallback):
        seconds = []
        def on_step_begin(self, *a, **k): self.wait(); self.start = time.perf_counter()
        def on_step_end(self, *a, **k): self.wait(); self.seconds.append(time.perf_counter() - self.start); note("learn")
        def wait(self): cuda and torch.cuda.synchronize()

    clock, judged, plain = Clock(), [], RubricReward.__call__

    peaks = {}

    def note(phase):
        if not cuda: return
        peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated() / 2**30)
        torch.cuda.reset_peak_memory_stats()

    def timed(self, *a, **k):
        clock.wait(); note("generate")
        start = time.perf_counter(); pay = plain(self, *a, **k); clock.wait()
        judged.append(time.perf_counter() - start)
        note("judge")
        return pay

    RubricReward.__call__ = timed
    trainer.args.save_strategy = "no"
    trainer.add_callback(clock)
    if cuda: torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if cuda else 0
    trainer.train()
    after = {k: look(k) for k in ("base", "live")}
    written = {h["completions/mean_length"] for h in trainer.state.log_history if "completions/mean_length" in h}
    tail = slice(min(2, ask["steps"] - 1), None)   # the first steps compile
    step = float(np.median(clock.seconds[tail]))
    print("RESULT " + json.dumps(dict(model=Path(ask["model"]).name, backend=backend, step=step, steps=[round(s, 3) for s in clock.seconds], judge_share=float(np.median(judged[tail])) / step,
                                      tokens_per_second=groups * each * n / step, loaded_gib=loaded / 2**30, peak_gib=max(peaks.values(), default=0), peaks=peaks, lengths=sorted(written),
                                      base_identical=bool(np.array_equal(before["base"], after["base"])), live_moved=bool(not np.array_equal(before["live"], after["live"])),
                                      adapted=type(trainer.model).__name__, checkpointing=str(trainer.args.gradient_checkpointing))), flush=True)


def ask_one(ask, seconds):
    "Start one process and read its result; what it printed is kept beside its runs"
    log = Path(ask["runs"]).parent / f"{Path(ask['model']).name}-{ask['backend']}.log"
    start = time.perf_counter()
    with log.open("a") as out:
        try:
            done = subprocess.run([sys.executable, __file__, "--one", json.dumps(ask)], stdout=subprocess.PIPE, stderr=out, text=True, timeout=seconds, check=False)
            said, end = done.stdout, f"exit {done.returncode}"
        except subprocess.TimeoutExpired: said, end = "", f"stopped after {seconds} s"
        out.write(said)
    found = [json.loads(line[7:]) for line in said.splitlines() if line.startswith("RESULT ")]
    if not found: print(f"{log.name}: {end}\n{log.read_text()[-3000:]}", flush=True)
    return [dict(r, whole=time.perf_counter() - start) for r in found]


def ratios(rows):
    "Unsloth over TRL, model by model"
    import pandas as pd
    of = pd.DataFrame(rows).groupby(["model", "backend"])[["tokens_per_second", "step", "peak_gib", "judge_share"]].median()
    out = {}
    for m in of.index.get_level_values(0).unique():
        out |= {f"{m}_judge_share_{b}": of.judge_share[m, b] for b in of.loc[m].index}
        if ("unsloth" in of.loc[m].index) and ("trl" in of.loc[m].index):
            out |= {f"{m}_tokens_per_second": of.tokens_per_second[m, "unsloth"] / of.tokens_per_second[m, "trl"], f"{m}_peak_memory": of.peak_gib[m, "unsloth"] / of.peak_gib[m, "trl"]}
    return {k: float(v) for k, v in out.items()}


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("out", nargs="?", type=Path)
    ask.add_argument("--models", default="qwen3-0.6b,qwen3-4b")
    ask.add_argument("--backends", default="")
    for name, default in dict(rounds=1, steps=6, seconds=600, micro_batch=8, token_budget=16384).items(): ask.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    ask.add_argument("--load-in-4bit", action="store_true")
    ask.add_argument("--smoke", action="store_true")
    ask.add_argument("--one")
    a = ask.parse_args()
    if a.one: return one(json.loads(a.one))
    import torch
    from hmx_feel.backend import SHAPES
    from measured import merge
    if a.out is None: ask.error("OUT: missing, allowed: a folder")
    known = [n for n, c in SHAPES.items() if c["model_type"] == "qwen3" and c["tie_word_embeddings"]]
    if odd := [n for n in a.models.split(",") if n not in known]: ask.error(f"--models: found {odd[0]!r}, allowed: {', '.join(known)}")
    cuda = torch.cuda.is_available()
    if not (cuda or a.smoke): raise SystemExit("on_gpu.py: found no CUDA GPU, allowed: a machine with one, or --smoke")
    backends = a.backends.split(",") if a.backends else ["trl", "unsloth"] if cuda else ["trl"]
    a.out.mkdir(parents=True, exist_ok=True)
    shape, micro_batch, rows = ((2, 4, 16), 4, []) if a.smoke else ((GROUPS, EACH, TOKENS), a.micro_batch, [])
    with tempfile.TemporaryDirectory() as scratch:
        for name in a.models.split(","):
            folder = make_model(name, Path(scratch) / name, a.smoke)
            if cuda: torch.cuda.empty_cache()
            for r in range(a.rounds):
                for backend in backends:
                    job = dict(model=str(folder), backend=backend, steps=a.steps, shape=shape, micro_batch=micro_batch,
                               load_in_4bit=a.load_in_4bit, token_budget=4096 if a.smoke else a.token_budget, runs=str(a.out / "logs" / f"runs-{backend}-{r}"))
                    (a.out / "logs").mkdir(exist_ok=True)
                    rows += ask_one(job, a.seconds)
                    print(rows[-1:], flush=True)
    if not rows: raise SystemExit("on_gpu.py: no process came to its end")
    import pandas as pd
    pd.DataFrame(rows).to_csv(a.out / "gpu_details.csv", index=False)
    facts = dict(gpu=torch.cuda.get_device_name() if cuda else "", gib=torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0,
                 groups=shape[0], answers=shape[1], tokens=shape[2], micro_batch=micro_batch, load_in_4bit=a.load_in_4bit, smoke=a.smoke, base_identical=all(r["base_identical"] for r in rows), live_moved=all(r["live_moved"] for r in rows))
    found = {k + "_4bit" * a.load_in_4bit: v for k, v in ratios(rows).items()}
    merge(a.out, "gpu", found, **facts)
    print(json.dumps(found))


if __name__ == "__main__": main()
