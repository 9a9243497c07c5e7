"""Backends: what is refused, how a model is loaded, what a run would take.

Unsloth itself is faked at one seam: a module of its name whose FastLanguageModel builds the plain model with PEFT and
takes the arguments that the real one takes.
"""
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import standins
from hmx_feel import backend, drift, grpo
from hmx_feel.backend import (CARDS, RULES, SEEN, SHAPES, card_defaults, changed_settings, check_4bit, check_backend, check_memory, check_versions, choose_backend,
                              count_parameters, device_memory, estimate_memory, free_memory, import_unsloth, linear_layers, load_trainable, load_unsloth, lora_parameters, shape_of, what_fits)
from hmx_feel.grpo import lora, train
from hmx_feel.judge import check_judge
from hmx_feel.policy import as_base, check_model, load_policy
from hmx_feel.rubric import load_arm, load_prompts
from hmx_feel.runs import TrainConfig, UserError

# the arguments of FastLanguageModel in Unsloth 2026.10.9 (models/loader.py, models/llama.py), as far as a loader could pass them
FROM_PRETRAINED = {"model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "token", "device_map", "rope_scaling", "fix_tokenizer",
                   "trust_remote_code", "use_gradient_checkpointing", "resize_model_vocab", "revision", "use_exact_model_name", "offload_embedding", "float32_mixed_precision",
                   "fast_inference", "gpu_memory_utilization", "float8_kv_cache", "random_state", "max_lora_rank", "disable_log_stats", "load_in_fp8"}
GET_PEFT_MODEL = {"r", "target_modules", "lora_alpha", "lora_dropout", "bias", "layers_to_transform", "layers_pattern", "use_gradient_checkpointing", "random_state", "max_seq_length",
                  "use_rslora", "modules_to_save", "init_lora_weights", "loftq_config"}


class FastLanguageModel:
    "Takes what Unsloth takes, gives what PEFT gives, and remembers what it was asked"
    asked = []

    @staticmethod
    def from_pretrained(**kw):
        assert not set(kw) - FROM_PRETRAINED, set(kw) - FROM_PRETRAINED
        FastLanguageModel.asked.append(("from_pretrained", kw))
        return AutoModelForCausalLM.from_pretrained(kw["model_name"], dtype=kw["dtype"]), None

    @staticmethod
    def get_peft_model(model, **kw):
        assert not set(kw) - GET_PEFT_MODEL, set(kw) - GET_PEFT_MODEL
        FastLanguageModel.asked.append(("get_peft_model", kw))
        torch.manual_seed(kw["random_state"])
        return get_peft_model(model, LoraConfig(**{k: kw[k] for k in ("r", "lora_alpha", "target_modules", "lora_dropout", "bias")}, task_type="CAUSAL_LM"))


@pytest.fixture
def unsloth(monkeypatch):
    "The stand-in, imported as if it had come first"
    made = types.ModuleType("unsloth")
    made.FastLanguageModel, made.__spec__ = FastLanguageModel, ModuleSpec("unsloth", None)
    monkeypatch.setitem(sys.modules, "unsloth", made)
    FastLanguageModel.asked.clear()
    return made


@pytest.fixture
def cuda(monkeypatch): monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(scope="module", params=standins.FAMILIES)
def family(request, tmp_path_factory): return str(standins.make_standin(request.param, tmp_path_factory.mktemp(request.param)))


# --- which backend -------------------------------------------------------------------------------------------

def test_auto_takes_unsloth_only_with_a_gpu_and_the_package(unsloth, monkeypatch):
    assert choose_backend("auto") == "trl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("auto") == choose_backend("unsloth") == "unsloth" and choose_backend("trl") == "trl"


def test_auto_without_the_package_is_trl(cuda): assert choose_backend("auto") == "trl"


def test_unsloth_without_a_gpu_names_the_extra(unsloth):
    with pytest.raises(UserError, match=r"needs a CUDA GPU .* pip install 'hmx-feel\[gpu\]'"): choose_backend("unsloth")


def test_unsloth_without_the_package_names_the_extra(cuda):
    with pytest.raises(UserError, match=r"is not installed, allowed: backend=trl, or pip install 'hmx-feel\[gpu\]'"): choose_backend("unsloth")


def test_a_misspelt_backend_is_named():
    with pytest.raises(UserError, match="backend: found 'unslot', allowed: auto, trl, unsloth .nearest: 'unsloth'."): choose_backend("unslot")


def test_four_bits_need_a_gpu_and_bitsandbytes():
    with pytest.raises(UserError, match="load_in_4bit: needs a CUDA GPU .* allowed: load_in_4bit=False"): check_4bit()
    with pytest.raises(UserError, match="load_in_4bit"): check_backend("trl", load_in_4bit=True)


def test_gemma2_is_judged_by_trl_only(unsloth, cuda, tmp_path):
    "Unsloth takes one attention mask; the judge has two for Gemma 2"
    spec = check_model(str(standins.make_standin("gemma2", tmp_path)))
    assert choose_backend("auto", spec) == "trl" and choose_backend("auto", check_model("tiny")) == "unsloth"
    with pytest.raises(UserError, match="cannot be judged under unsloth.* allowed: backend=trl"): choose_backend("unsloth", spec)


# --- versions ------------------------------------------------------------------------------------------------

def test_seen_is_what_constraints_say():
    pins = dict(line.split("==") for line in (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#"))
    assert SEEN == {k: pins[k] for k in SEEN}


def test_what_is_installed_here_trains_here(): assert check_versions("trl") == []


@pytest.mark.parametrize(("package", "version"), [("trl", "1.16.0"), ("trl", "0.19.0"), ("transformers", "5.18.0"), ("transformers", "5.1.0"), ("datasets", "5.0.0"), ("datasets", "4.4.2"),
                                                  ("torch", "2.15.0"), ("torch", "2.15.0+cu130"), ("peft", "0.17.1"), ("bitsandbytes", "0.46.0")])
def test_what_unsloth_does_not_work_with_is_refused(package, version):
    with pytest.raises(UserError) as e: check_versions("unsloth", SEEN | {package: version}, cuda=True)
    line = str(e.value)
    assert line.startswith(f"backend: unsloth does not work with {package} {version}") and "seen working together: torch 2.13.0, transformers 5.17.0, trl 1.12.0" in line and "\n" not in line


def test_a_trl_that_needs_a_gpu_is_refused_without_one():
    with pytest.raises(UserError, match="trl 1.15.0: its GRPO calls a Triton kernel, which needs a GPU"): check_versions("trl", SEEN | {"trl": "1.15.0"}, cuda=False)
    said, = check_versions("trl", SEEN | {"trl": "1.15.0"}, cuda=True)
    assert "has not been seen working here" in said


def test_rules_know_their_own_combination():
    for b in ("trl", "unsloth"): assert check_versions(b, SEEN | {"unsloth": "2026.10.9", "bitsandbytes": "0.49.0"}, cuda=False) == []
    assert {r.backend for r in RULES} == {"trl", "unsloth"}


# --- the order of imports ------------------------------------------------------------------------------------

def test_trl_before_unsloth_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(UserError, match="trl was imported before unsloth.* restart the kernel"): import_unsloth()


def test_unsloth_comes_first_in_a_fresh_process(tmp_path):
    "The checks of a run import neither trl nor transformers nor peft before unsloth"
    (tmp_path / "unsloth.py").write_text("import sys\nprint('before', sorted({'trl', 'transformers', 'peft'} & set(sys.modules)))\n")
    code = """import torch; torch.cuda.is_available, torch.cuda.mem_get_info = lambda: True, lambda: (2**34, 2**34)
from hmx_feel import grpo; from hmx_feel.runs import TrainConfig
print(grpo.check_run(TrainConfig(dtype='float32'))['config'].backend)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert done.stdout.splitlines() == ["before []", "unsloth"], done.stderr


def test_importing_trainers_does_not_import_trl():
    "Training asks for its backend before anything has imported trl"
    done = subprocess.run([sys.executable, "-c", "import hmx_feel.grpo, hmx_feel.backend, sys; print(sorted({'trl', 'transformers', 'peft'} & set(sys.modules)))"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unsloth_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "unsloth.py").write_text("raise NotImplementedError('Unsloth cannot find any torch accelerator\\nYou need a GPU.')\n")
    code = "from hmx_feel.backend import import_unsloth\ntry: import_unsloth()\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout.startswith("UserError backend: unsloth is installed and cannot be imported (Unsloth cannot find any torch accelerator)") and done.stdout.count("\n") == 1


# --- loading -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("four", [False, True])
def test_what_unsloth_is_asked_for(unsloth, four):
    load_unsloth(check_model("tiny"), 4096, load_in_4bit=four, dtype="bfloat16", lora_r=8, lora_alpha=16, seed=7)
    (_, load), (_, peft) = FastLanguageModel.asked
    want = dict(max_seq_length=4096, load_in_4bit=four, dtype=torch.bfloat16, fast_inference=False, full_finetuning=False, use_exact_model_name=True, random_state=7, max_lora_rank=8, trust_remote_code=False)
    assert {k: load[k] for k in want} == want and Path(load["model_name"]).is_dir()
    assert peft == dict(r=8, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=7,
                        target_modules=["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"])


def test_both_backends_start_from_the_same_model(unsloth, family):
    "Same answers with the adapter off, adapters on the same layers, equal seeds give equal adapters"
    spec, ids = check_model(family), torch.arange(5, 25)[None]
    plain = load_trainable("trl", spec, 4096, lora_r=4, lora_alpha=8)
    fast = load_trainable("unsloth", spec, 4096, lora_r=4, lora_alpha=8, seed=3)
    assert fast.adapted and not plain.adapted and fast.tokenizer.eos_token == plain.tokenizer.eos_token
    with torch.no_grad(), as_base(fast.model): assert torch.allclose(fast.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, atol=1e-5)
    torch.manual_seed(3)
    put = get_peft_model(plain.model, lora(TrainConfig(lora_r=4, lora_alpha=8)))
    adapter = lambda m: {n: p for n, p in m.named_parameters() if "lora_" in n}
    assert adapter(put).keys() == adapter(fast.model).keys() and all(torch.equal(p, adapter(fast.model)[n]) for n, p in adapter(put).items())
    assert sum(p.numel() for p in adapter(put).values()) == lora_parameters(shape_of(plain.model.config.to_dict()), 4)


def test_the_judge_is_at_home_in_a_fast_policy(unsloth):
    policy = load_unsloth(check_model("tiny"), 4096, lora_r=4, seed=1)
    check_judge(policy, load_arm("forward").load_rubric(), load_prompts("hmx-feel", split="probe")[0])


def test_a_run_under_unsloth_has_one_adapter_and_goes_on(unsloth, monkeypatch, tmp_path):
    "Its reference is the adapter off; stopped after a checkpoint, it comes to the bytes of a run that was not"
    load, stop = drift.load_prompts, grpo.stop_rule
    monkeypatch.setattr(grpo, "check_backend", lambda *a: "unsloth")
    monkeypatch.setattr(drift, "load_prompts", lambda *a, **kw: load(*a, **kw)[:2])
    small = dict(steps=2, completions_per_step=4, group_size=4, max_completion=8, probe_every=9, save_every=1, judge="ema", noise_floor=0)
    whole = train(TrainConfig(runs=str(tmp_path / "whole"), **small))
    torn = TrainConfig(runs=str(tmp_path / "torn"), **small)
    monkeypatch.setattr(grpo, "stop_rule", lambda rows, config: "torn" if len(rows) == 2 else None)
    with pytest.raises(UserError, match="stopped: torn; the checkpoint of step 1 is kept"): train(torn)
    monkeypatch.setattr(grpo, "stop_rule", stop)
    run = train(torn)
    assert run.read_jsonl("resumes.jsonl")[0]["step"] == 1 and run.read_json("config.json")["resolved"]["backend"] == "unsloth"
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"): assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [p for p in run.path.rglob("*") if p.name == "ref"] and run.metrics().kl.iloc[0] == 0


def test_linear_layers_are_pefts(family):
    net = load_policy(family).model
    want = set(get_peft_model(net, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).peft_config["default"].target_modules)
    assert set(linear_layers(load_policy(family).model)) == {name.split(".")[-1] for name in want}
    with pytest.raises(UserError, match="target_modules: found q_porj, allowed: down_proj, .*nearest: 'q_proj'"): linear_layers(load_policy(family).model, ["q_porj"])


def test_a_changed_setting_that_decides_the_result_is_refused():
    args = types.SimpleNamespace(per_device_train_batch_size=8, report_to=["none"], loss_type="dapo")
    assert changed_settings(dict(loss_type="dapo", report_to=["none"]), args) == {}
    with pytest.raises(UserError, match="unsloth turned per_device_train_batch_size from 4 into 8"): changed_settings(dict(per_device_train_batch_size=4), args, "unsloth")
    with pytest.raises(UserError, match="turned learning_rate from 0.001 into None"): changed_settings(dict(learning_rate=.001), args, "unsloth")


# --- memory --------------------------------------------------------------------------------------------------

def test_parameters_are_counted_right(family):
    net = load_policy(family).model
    assert count_parameters(shape_of(net.config.to_dict()))["total"] == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_are_counted_right(name):
    "The real configurations, without their weights"
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"): net = AutoModelForCausalLM.from_config(config)
    assert count_parameters(shape_of(config.to_dict()))["total"] == sum(p.numel() for p in net.parameters()) == count_parameters(shape_of(SHAPES[name]))["total"]


@pytest.mark.parametrize("extra", [dict(model_type="qwen2"), dict(model_type="mistral"), dict(model_type="llama", attention_bias=True, mlp_bias=True), dict(model_type="qwen3", attention_bias=True),
                                   dict(model_type="gemma3_text", tie_word_embeddings=True)])
def test_biases_and_norms_of_other_families(extra):
    small = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=100)
    config = AutoConfig.for_model(**small | extra)
    with torch.device("meta"): net = AutoModelForCausalLM.from_config(config)
    assert count_parameters(shape_of(config.to_dict()))["total"] == sum(p.numel() for p in net.parameters())


def test_what_is_not_known_is_not_estimated():
    with pytest.raises(UserError, match="model_type: found 'gpt2', allowed: qwen3, "): shape_of(GPT2Config().to_dict())
    with pytest.raises(UserError, match="config.json: found no hidden_size, vocab_size"): shape_of({k: v for k, v in SHAPES["qwen3-4b"].items() if k not in ("hidden_size", "vocab_size")})


def saved_bytes(net, rows, T):
    "What a forward pass keeps for the backward pass, weights aside"
    own, seen = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}
    def keep(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own: seen[s.data_ptr()] = (s.nbytes(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        net(input_ids=torch.randint(0, 100, (rows, T)), use_cache=False, logits_to_keep=1)
    return sum(n for n, _ in seen.values())


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2"])
def test_activations_are_what_torch_keeps(kind):
    "Bytes per token and layer, from networks of two depths, against the formula: never more than a tenth below, nor half above"
    def net(layers):
        config = AutoConfig.for_model(kind, hidden_size=256, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=768, vocab_size=200)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager" if kind == "gemma2" else "sdpa")
        return get_peft_model(made, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    T = 128
    found = (saved_bytes(net(4), 2, T) - saved_bytes(net(2), 2, T)) / 2 / (2 * T)
    want = backend._layer_bytes(shape_of(net(1).config.to_dict()), 2, T)
    assert .9 * found < want < 1.5 * found, (found, want)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_training_step_peaks_where_the_formula_says(kind):
    "The largest sum of live allocations in a step with a large vocabulary, counted by the profiler"
    from torch.profiler import ProfilerActivity, profile
    from trl.trainer.utils import selective_log_softmax
    V, B, P, C = 20000, 2, 16, 64
    config = AutoConfig.for_model(kind, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=128, vocab_size=V)
    net = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(0, V, (B, P + C))
    def step():
        with torch.autocast("cpu", torch.bfloat16): logits = net(input_ids=ids, use_cache=False, logits_to_keep=C + 1).logits
        logps = selective_log_softmax(logits.float()[:, :-1][:, -C:] / 1., ids[:, -C:])
        (-torch.exp(logps - logps.detach()).mean()).backward()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: step()
    now = top = 0
    for e in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if e.name() == "[memory]": now += e.nbytes(); top = max(top, now)
    want = sum(backend._training(shape_of(config.to_dict()), 2, B, P, C, False, "trl").values())
    assert .85 * top < want < 1.4 * top, (top / 2**20, want / 2**20)


def test_every_part_grows_with_what_it_depends_on():
    config = SHAPES["qwen3-0.6b"]
    e = estimate_memory(config)
    grows = lambda part, **kw: e.again(**kw)[part] > e[part]
    assert grows("logits", micro_batch=16) and grows("activations", micro_batch=16) and grows("generation", completions_per_step=128) and grows("generation", max_completion=512)
    assert grows("judge", token_budget=32768) and grows("adapter", lora_r=32) and grows("adapter", ema=True) and grows("heads", head=2000) and grows("activations", gradient_checkpointing=False)
    assert grows("weights", dtype="float32") and all(grows(part, judge_configs=(SHAPES["qwen3-4b"],)) for part in ("weights", "heads", "judge"))
    assert e.again(judge_configs=(config, config))["weights"] == pytest.approx(3 * e["weights"])
    assert e.again(load_in_4bit=True)["weights"] < e["weights"] and e.again(backend="unsloth")["logits"] == e["logits"] / 8
    assert all(v > 0 for v in e.values()) and e["total"] < sum(v for k, v in e.items() if k != "total")


def test_nothing_is_refused_on_a_cpu():
    assert device_memory() is None and free_memory() is None
    check_memory(estimate_memory(SHAPES["qwen3-8b"], micro_batch=64), free_memory())


def test_defaults_hang_on_the_card_and_refusals_on_what_is_free(cuda, monkeypatch):
    "A run that goes on beside another program finds the settings, and so the folder, that it began with"
    found = set()
    for free in (23.5, 15., 2.):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 23.6 * 2**30))
        found.add(tuple(card_defaults("qwen3-4b", device_memory()).items()))
        assert free_memory() == free
    assert len(found) == 1
    with pytest.raises(UserError, match="2.0 are free"): check_memory(estimate_memory(SHAPES["qwen3-4b"]), free_memory())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("available", [3, 6, 10, 14.4, 21.6])
@pytest.mark.parametrize("asked", [dict(micro_batch=32), dict(micro_batch=32, backend="unsloth"), dict(max_completion=1024, backend="unsloth")], ids=["trl", "unsloth", "long"])
def test_the_hint_of_a_refusal_fits(name, available, asked):
    e = estimate_memory(SHAPES[name], **asked)
    if e["total"] <= available: return check_memory(e, available)
    with pytest.raises(UserError, match="memory: about .* GiB are needed") as refused: check_memory(e, available)
    fits, line = what_fits(e, available), str(refused.value)
    assert all(k in line and str(v) in line for k, v in fits.items()) if fits else "a smaller model" in line
    if fits:
        assert e.again(**fits)["total"] <= available
        for k in fits: assert e.again(**{n: v for n, v in fits.items() if n != k})["total"] > available, f"{k} is lowered without need"


def test_a_refusal_names_the_largest_part():
    with pytest.raises(UserError, match=r"the largest part is logits with .* lower micro_batch from 32 to 16$"): check_memory(estimate_memory(SHAPES["qwen3-0.6b"], micro_batch=32), 14)
    with pytest.raises(UserError, match=r"the largest part is weights with 15.3: set load_in_4bit=True$"): check_memory(estimate_memory(SHAPES["qwen3-8b"]), 21.6)


def test_every_card_holds_what_it_is_given():
    assert set(CARDS) == set(SHAPES)
    for model, cards in CARDS.items():
        for gb in cards:
            given = card_defaults(model, gb)
            assert 64 % given["micro_batch"] == 0 and estimate_memory(SHAPES[model], **given)["total"] <= .9 * gb
    assert not any(given[1] for model, cards in CARDS.items() for given in cards.values() if model != "qwen3-8b"), "four bits below 8B"
    assert card_defaults("qwen3-8b", 23.6)["load_in_4bit"] and not card_defaults("qwen3-8b", 44.5)["load_in_4bit"]
    assert card_defaults("qwen3-8b", 12) == card_defaults("qwen3-8b", 24) and card_defaults("qwen3-4b", 79) == card_defaults("qwen3-4b", 24)
