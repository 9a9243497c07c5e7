"""Log-likelihoods with everything shared read once, against lm_eval's own class, on stand-ins of three families."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from standins import make_standin

from hmx_feel.engine import Journal, families, policy_lm, quiet
from hmx_feel.policy import Policy, load_policy, looking
from hmx_feel.runs import UserError
from hmx_feel.truthfulqa import question_text

torch.set_num_threads(1)
benchmarks = os.environ.get("HMX_BENCHMARKS", "")
needs_benchmarks = pytest.mark.skipif(not benchmarks, reason="HMX_BENCHMARKS is not set: no TruthfulQA data")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    home, made = tmp_path_factory.mktemp("standins"), {}
    def of(family):
        if family not in made: made[family] = load_policy(str(make_standin(family, home / family)))
        return made[family]
    return of


def ask(*args): return SimpleNamespace(args=args)


QUESTIONS = [question_text(f"Which one is a {k}?") + "\nA:" for k in ("bird", "tool you would borrow", "fish")] + ["Which one?", "Which one? A"]
OPTIONS = (" A", " crow", " a hammer, or a saw if there is one.", " none of them that I could name.")
REQUESTS = [ask(q, o) for q in QUESTIONS for o in OPTIONS]


def lm_eval_answers(policy, requests, batch_size=4):
    with quiet(), looking(policy.model):
        lm = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=batch_size, max_length=policy.context, softmax_dtype="float32")
        return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_to_lm_eval(family, batch_size, policy):
    "Behind six examples, longer than Gemma's window of 64; two questions that share no head with the rest"
    p = policy(family)
    assert family != "gemma2" or (p.model.config._attn_implementation == "eager" and len(p.tokenizer(QUESTIONS[0]).input_ids) > 128)
    theirs = lm_eval_answers(p, REQUESTS)
    ours = policy_lm(p, batch_size, chat=False).loglikelihood(REQUESTS)
    assert np.abs(np.subtract([ll for ll, _ in ours], [ll for ll, _ in theirs])).max() < 1e-4
    assert [bool(g) for _, g in ours] == [bool(g) for _, g in theirs]
    assert len({round(ll, 3) for ll, _ in ours}) >= len(REQUESTS) * .8


def test_a_pair_is_computed_once_and_a_journal_spares_the_model(policy, tmp_path, monkeypatch):
    from hmx_feel import engine
    p, seen = policy("qwen3"), []
    real = engine.option_logprobs
    monkeypatch.setattr(engine, "option_logprobs", lambda core, batch, *a: seen.append(sum(len(o) for _, o in batch)) or real(core, batch, *a))
    first = policy_lm(p, 2, chat=False, journal=Journal(tmp_path / "j", w=1)).loglikelihood(REQUESTS + REQUESTS[:4])
    assert sum(seen) == len(REQUESTS) and first[-4:] == first[:4]
    again = policy_lm(p, 2, chat=False, journal=Journal(tmp_path / "j", w=1)).loglikelihood(REQUESTS)
    assert sum(seen) == len(REQUESTS) and again == first[:len(REQUESTS)]
    policy_lm(p, 2, chat=False, journal=Journal(tmp_path / "j", w=2)).loglikelihood(REQUESTS)       # made with something else
    assert sum(seen) == 2 * len(REQUESTS)


def test_a_journal_that_stops_anywhere_gives_the_same_numbers(policy, tmp_path):
    "To the last digit: what is left is cut into the same batches"
    p = policy("qwen3")
    whole = policy_lm(p, 2, chat=False, journal=Journal(tmp_path / "whole", w=1)).loglikelihood(REQUESTS)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    for n in range(1, len(lines)):
        (tmp_path / "torn").write_bytes(b"".join(lines[:n]) + lines[n][:7])
        assert policy_lm(p, 2, chat=False, journal=Journal(tmp_path / "torn", w=1)).loglikelihood(REQUESTS) == whole


def test_what_an_asker_heard_is_not_asked_again(policy, tmp_path, monkeypatch):
    "Replies and likelihoods, a judge's apart from the model's; a journal that stops anywhere gives the same texts"
    from hmx_feel import measure
    chats, seen, real = [[dict(role="user", content=f"Which one is number {i}? " + "very " * (i % 3))] for i in range(7)], [], measure.generate
    monkeypatch.setattr(measure, "generate", lambda p, some, *a: seen.append(len(some)) or real(p, some, *a))
    asker = lambda name, who=None: measure.Asker(policy("qwen3"), 2, Journal(tmp_path / name, w=1) if who is None else Journal(tmp_path / name, w=1).of(who))
    whole, lls = asker("j").say(chats, 6), asker("j").logps(chats, [["A", "B"]] * 7)
    assert asker("j").say(chats + chats[:2], 6) == whole + whole[:2] and sum(seen) == 7 and np.array_equal(asker("j").logps(chats, [["A", "B"]] * 7), lls)
    asker("j", "judge").say(chats[:2], 6)
    assert sum(seen) == 9
    (tmp_path / "torn").write_bytes(b"".join((tmp_path / "j").read_bytes().splitlines(keepends=True)[:3]))
    assert asker("torn").say(chats, 6) == whole and sum(seen) == 12


def test_a_model_that_scales_its_logits_is_read_one_by_one(policy, caplog):
    "Packed rows would not know of it; the comparison is made once for each loaded model"
    from transformers import GraniteConfig, GraniteForCausalLM

    from hmx_feel import engine
    from hmx_feel.policy import Policy
    p = policy("qwen3")
    torch.manual_seed(0)
    net = GraniteForCausalLM(GraniteConfig(vocab_size=p.model.config.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                           logits_scaling=4., initializer_range=.3, max_position_embeddings=4096)).eval()
    odd = Policy(net, p.tokenizer, p.spec)
    few = REQUESTS[-8:]
    ours = [policy_lm(odd, 4, chat=False).loglikelihood(few) for _ in (0, 1)]
    assert np.abs(np.subtract([ll for ll, _ in ours[0]], [ll for ll, _ in lm_eval_answers(odd, few)])).max() < 1e-4 and ours[0] == ours[1]
    assert [r.getMessage().split(",")[0] for r in caplog.records if "packed" in r.getMessage()] == ["GraniteForCausalLM: read packed"]
    assert engine._as_read(p.model, [(("", ""), [5, 6], [7])], 0)


def test_families_cover_every_context_once_and_never_cost_more():
    rng = np.random.default_rng(0)
    for _ in range(20):
        heads = [list(rng.integers(0, 50, rng.integers(0, 400))) for _ in range(4)]
        contexts = [list(c) for c in {tuple(heads[rng.integers(4)] + list(rng.integers(0, 3, rng.integers(1, 9)))) for _ in range(30)}]
        found = families(contexts)
        assert sorted(i for _, some in found for i in some) == list(range(len(contexts)))
        assert all(contexts[i][:len(head)] == head and len(head) < len(contexts[i]) for head, some in found for i in some)
        cost = sum(len(head) + sum(len(contexts[i]) - len(head) for i in some) for head, some in found)
        assert cost <= sum(map(len, contexts))


def test_letters_of_different_length_are_refused(policy):
    lm = policy_lm(policy("qwen3"))
    with pytest.raises(UserError, match="different numbers of tokens: A 1, B 2"):
        lm._loglikelihood_tokens([(("Q", "A"), [5], [6]), (("Q", "B"), [5], [6, 7])])


def test_generation_equals_lm_eval_and_is_bounded(policy, tmp_path):
    p = policy("llama")
    how = dict(until=["\n\n"], max_gen_toks=6)
    asks = [ask(q, how) for q in QUESTIONS]
    journal = Journal(tmp_path / "j", w=1)
    ours = policy_lm(p, 2, chat=False, journal=journal).generate_until(asks)
    with quiet(), looking(p.model):
        lm = HFLM(pretrained=p.model, tokenizer=p.tokenizer, batch_size=1, max_length=p.context)
        assert ours == lm.generate_until(asks, disable_tqdm=True)
    assert max(len(p.tokenizer(t).input_ids) for t in ours) <= 8 and len(journal) == len(asks)
    with pytest.raises(UserError, match="1 of 1 texts are longer"): policy_lm(p, chat=False).generate_until([ask(QUESTIONS[0], dict(until=["."], max_gen_toks=4090))])


def test_a_model_without_chat_template_is_refused(policy):
    p = policy("qwen3")
    was, p.tokenizer.chat_template = p.tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="has no chat template"): policy_lm(p)
        assert policy_lm(p, chat=False)
    finally: p.tokenizer.chat_template = was


@needs_benchmarks
def test_truthfulqa_v0_decisions(policy, tmp_path):
    "MC1 and MC2 of the first questions, from lm_eval's class and from ours"
    from hmx_feel.truthfulqa import mc1, mc2, truthfulqa_v0
    p, docs = policy("qwen3"), truthfulqa_v0(benchmarks)[0][:8]
    for target, score in (("mc1_targets", mc1), ("mc2_targets", mc2)):
        asks = [[ask(question_text(d["question"]) + "\nA:", " " + c) for c in d[target]["choices"]] for d in docs]
        flat = [r for g in asks for r in g]
        cuts = np.cumsum([len(g) for g in asks])[:-1]
        theirs, ours = (np.split(np.array([ll for ll, _ in said]), cuts) for said in (lm_eval_answers(p, flat), policy_lm(p, 8, chat=False).loglikelihood(flat)))
        for d, a, b in zip(docs, theirs, ours, strict=True):
            pair = [score(d, [(ll, None) for ll in lls])["acc"] for lls in (a, b)]
            assert abs(pair[0] - pair[1]) < 1e-6


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_in_every_layer_is_kept(family, monkeypatch):
    "Their configuration names a window and no kinds of layers; the check reads the longest request"
    import transformers as tf
    from hmx_feel.engine import _as_read, option_logprobs
    small = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=16, max_position_embeddings=256, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    net = dict(mistral=lambda: tf.MistralForCausalLM(tf.MistralConfig(**small)), phi3=lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**small)))[family]().eval()
    for p in net.parameters(): p.data.normal_(0, .3)
    context, options = torch.randint(1, 100, (60,)).tolist(), [[3, 4, 5], [7, 8]]
    with torch.no_grad():
        ours = [ll for ll, _ in option_logprobs(net, [(context, options)], [], 0)[0]]
        own = [torch.log_softmax(net(torch.tensor([context + o])).logits[0], -1)[59:-1].gather(1, torch.tensor(o)[:, None]).sum().item() for o in options]
        monkeypatch.setattr("hmx_feel.engine.sliding", lambda config: dict(window=None))
        wide = [ll for ll, _ in option_logprobs(net, [(context, options)], [], 0)[0]]
    np.testing.assert_allclose(ours, own, atol=1e-4)
    assert abs(wide[0] - own[0]) > .01 and not _as_read(net, [(None, [5], [6]), (None, context, options[0])], 0)


def test_a_system_text_is_read_where_lm_eval_has_no_context(policy):
    from dataclasses import replace

    from lm_eval.api.instance import Instance
    plain = policy("qwen3")
    told = Policy(plain.model, plain.tokenizer, replace(plain.spec, system_text="Say what you feel."))
    ask = lambda: [Instance("loglikelihood", {}, ("", o), 0) for o in ("She is late.", "He is late.")]
    lls = lambda p: [ll for ll, _ in policy_lm(p, 4, chat=False).loglikelihood(ask())]
    assert lls(plain) != lls(told)
    spelt = [Instance("loglikelihood", {}, ("Say what you feel.\n\n", o), 0) for o in ("She is late.", "He is late.")]
    assert lls(told) == pytest.approx([ll for ll, _ in policy_lm(plain, 4, chat=False).loglikelihood(spelt)], abs=1e-4)
