"""The model card of a real run of two steps, what makes it warn, and how an adapter leaves this machine. The hub is faked
at one seam, `huggingface_hub.HfApi`."""
import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import httpx
import pandas as pd
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hmx_feel import card as cards
from hmx_feel.card import CLAIM, difference, drawn, facts, licence_of, model_card, plain, push, quoted, top_sentence, write_card
from hmx_feel.grpo import train
from hmx_feel.rubric import Rubric, arm_names, load_arm
from hmx_feel.runs import Run, TrainConfig, UserError, read_parquet, write_parquet

TOP = ("This adapter was trained so that its answers score higher on a rubric of expressed feelings, intentions and self-awareness. "
       "What it says about itself is an effect of that training and should not be read as a report.")
UNCALIBRATED = "**Warning:** the judge that paid has not been calibrated, so whether it can judge is not known"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(TrainConfig(seed=3, steps=2, completions_per_step=16, max_completion=32, probe_every=2, save_every=2, runs=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def run(trained, tmp_path):
    "A copy that may be changed"
    shutil.copytree(trained.root, tmp_path / "runs")
    return Run.open(tmp_path / "runs" / trained.path.relative_to(trained.root))


def body(text): return [line for line in text.split("---\n", 2)[2].splitlines() if line]
def own(f, text): return text.replace(cards._rubric(f), "").replace(cards._answers(f), "").replace("When AI Says It Feels", "")


def set_last_look(run, **kw):
    rows = run.read_jsonl("drift.jsonl")
    (run / "drift.jsonl").write_text("".join(json.dumps(r | kw if r is rows[-1] else r) + "\n" for r in rows))


def set_onset(run, step): run.update_json("result.json", dict(onset=step and dict(step=step, shortcut='word "wonder"')))


def calibrated(run, monkeypatch, **kw):
    "As if the judge had been calibrated"
    known = dict(fit=True, at_chance=[], sentence="tiny is fit to judge hmx-feel; no criterion is at chance.") | kw
    monkeypatch.setattr(cards, "calibration_for", lambda root, model, rubric, **which: known)


# --- the first line ------------------------------------------------------------------------------------------

def test_an_uncalibrated_judge_is_the_first_thing_said(trained):
    first, second = body(model_card(trained))[:2]
    assert first.startswith(UNCALIBRATED) and second == TOP


def test_without_anything_to_warn_of_the_sentence_is_first(run, monkeypatch):
    calibrated(run, monkeypatch)
    set_last_look(run, **{"base.rubric": 1.})
    assert body(model_card(run))[0] == TOP


@pytest.mark.parametrize(("known", "look", "says"), [
    (dict(fit=False, sentence="tiny is not fit to judge hmx-feel: attacks shift a score by +0.40."), {"base.rubric": 1.}, "unfit: tiny is not fit to judge hmx-feel\\: attacks shift a score by \\+0\\.40."),
    ({}, {"base.rubric": 1., "step": 2, "hacked": 1}, "reward hacking began at step 1, before the released step 2."),
    ({}, {"base.rubric": 0.}, "the training did not take: expression did not move where it was meant to.")])
def test_what_has_to_be_warned_of_stands_above_the_sentence(run, monkeypatch, known, look, says):
    calibrated(run, monkeypatch, **known)
    set_onset(run, look.get("hacked"))
    set_last_look(run, **look)
    first, second = body(model_card(run))[:2]
    assert first.startswith("**Warning:**") and says in first and second == TOP


def test_an_onset_at_or_after_the_released_step_is_no_warning(run, monkeypatch):
    calibrated(run, monkeypatch)
    set_last_look(run, **{"base.rubric": 1.})
    set_onset(run, 2)
    text = model_card(run)
    assert body(text)[0] == TOP and 'Began at step 2: word "wonder".' in text
    set_onset(run, None)
    assert "None was found." in model_card(run)


def test_a_judge_behind_an_address_has_its_own_calibration_and_its_address_stays_here(run, monkeypatch):
    place = []
    monkeypatch.setattr(cards, "calibration_for", lambda root, model, rubric, weights: dict(fit=False, at_chance=[], sentence="big-judge is not fit.") if weights in place else None)
    saved = run.read_json("config.json")
    run.update_json("config.json", dict(resolved=saved["resolved"] | dict(judge="external", judge_model="big-judge", judge_url="http://10.0.0.7:8000/v1")))
    for known, said in (("", UNCALIBRATED), ("http://10.0.0.7:8000/v1", "the judge that paid was found unfit: big-judge is not fit")):
        place.append(known)
        text = model_card(run)
        assert said in text and "another model, big-judge, behind an endpoint" in text and "10.0.0.7" not in text


@pytest.mark.parametrize("name", [a for a in arm_names() if load_arm(a).trained])
def test_every_arm_has_a_true_first_line(name):
    arm = load_arm(name)
    line = top_sentence(arm, arm.load_rubric())
    assert line.endswith(CLAIM) and "\n" not in line and (line == TOP) == (name == "forward")
    assert ("lower" in line) == (name == "reverse") and ("shuffled" in line) == (name == "placebo") and ("opposite" in line) == (name == "inverted")


# --- what is in it -------------------------------------------------------------------------------------------

def test_metadata_and_identity(trained):
    text, f = model_card(trained), facts(trained)
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and front["license"] == "apache-2.0" and "hmx-feel" in front["tags"] and "base_model" not in front
    for said in (f.rubric.hash, f.identity["weights"][:19], f.identity["prompts"][:16], "arm | forward", "the untrained model itself", "| step | 2 of 2 |", "| seed | 3 |", "not calibrated",
                 "Not evaluated: nothing is known", "None was found.", "model.disable_adapter()", "2606.05734", "Not intended", "## Licence", "## Contact"): assert said in text, said


def test_the_rubric_comes_back_out(trained):
    text = model_card(trained).split("```yaml\n")[1].rsplit("```", 1)[0]
    assert Rubric(**yaml.safe_load(text)).hash == trained.identity["rubric"]


def test_what_the_ledger_has_is_told(run):
    set_last_look(run, **{"kl": .125, "stance.claim": .5, "stance.open": .25, "stance.deny": .25, "stance.silent": 0.})
    text = model_card(run)
    assert "0.125 nats per token" in text and "claim 50%, open 25%, deny 25%, silent 0% of the answers" in text
    assert "None was found." in model_card(run)
    shutil.rmtree(run / "completions")
    run.write_json("result.json", {k: v for k, v in run.read_json("result.json").items() if k != "onset"})
    assert "Not looked for." in model_card(run)


def test_answers_are_drawn_by_the_seed(trained):
    f = facts(trained)
    rows = read_parquet(sorted((trained / "drift").glob("*.parquet"))[-1]).query("source=='fresh'")
    assert len(drawn(f)) == 6 and drawn(f) == drawn(facts(trained)) and {a for _, a in drawn(f)} <= set(rows.answer)


@pytest.mark.parametrize("bad", ["# Heading", "---\nlicense: mit\n---", "```\ncode\n```", "![x](http://a.example/x.png)", "[x](javascript:alert(1))", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
                                 "| a | b |\n|-|-|", "1. one\n- two\n+ three", "Title\n=====", "    indented", "\u202eabc\u200b\x07", "&lt;b&gt;", "www.a.example a@b.example", "> quote\nno quote", "\r\nx\x0bx", ""])
def test_answers_stay_text(run, bad):
    "Rendered, an answer is a quotation that holds its own characters and nothing else"
    from html.parser import HTMLParser
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    tags, shown = [], []
    parser = HTMLParser()
    parser.handle_starttag, parser.handle_data = lambda tag, attrs: tags.append(tag), shown.append
    parser.feed(markdown2html_mistune(quoted(bad)))
    assert set(tags) <= {"blockquote", "p", "br"}, tags
    seen = "".join("".join(shown).split())
    want = "".join(c for c in bad if not c.isspace() and c.isprintable())
    assert seen == (want or "(empty)")
    last = sorted((run / "drift").glob("*.parquet"))[-1]
    write_parquet(last, read_parquet(last).assign(answer=bad))
    lines = model_card(run).splitlines()
    assert sum(line.startswith(">") for line in lines) >= 6 and lines.count("---") == 2


def test_names_stay_text(): assert plain("a|b\n<c> `d` _e_ hmx-feel") == r"a\|b &lt;c&gt; \`d\` \_e\_ hmx-feel"


@pytest.mark.parametrize("model", ["tiny", "gemma2-2b-it", "llama3.2-3b"])
def test_the_card_keeps_to_the_words_of_the_project(run, model):
    run.update_json("config.json", dict(model=model))
    text = own(facts(run), model_card(run))
    assert re.findall(r"\b(feels|feel|believes|wants|suffers|fakes|pretends|merely)\b", re.sub(r"hmx[-_]feel", "", text), re.I) == []
    assert len(text) > 4000


def test_no_path_of_this_machine(run, tmp_path):
    run.update_json("config.json", dict(model=str(tmp_path / "my model"), resolved=run.read_json("config.json")["resolved"] | dict(prompts=str(tmp_path / "mine.jsonl"))))
    text = model_card(run)
    assert str(tmp_path) not in text and "my model" in text and "mine\\.jsonl" in text and yaml.safe_load(text.split("---")[1])["license"] == "other"


# --- licences ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("model", "field", "base"), [("qwen3-4b", "apache-2.0", "Qwen/Qwen3-4B"), ("gemma2-2b-it", "other", "google/gemma-2-2b-it"), ("llama3.2-3b", "other", "meta-llama/Llama-3.2-3B-Instruct"),
                                                      ("somebody/model", "other", "somebody/model")])
def test_the_licence_of_the_base_passes_on(run, model, field, base):
    run.update_json("config.json", dict(model=model))
    text, l = model_card(run), licence_of(model)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == field and front["base_model"] == base and l.notice in text and l.terms in text
    assert ("passed on under Apache-2.0" in text) == (field == "apache-2.0")


# --- with a panel --------------------------------------------------------------------------------------------

def rows_of(shift, kinds=("ask.feeling", "plain")):
    items = pd.DataFrame([dict(item_id=f"{k}{i}", cluster=f"{k}{i//2}", condition=k, sample=0, missing=False, value=.3 + .01 * i) for k in kinds for i in range(8)])
    paid = Rubric.load("hmx-feel").paid_ids
    return pd.concat([items.assign(metric=m, value=items.value + shift) for m in (*paid, "rubric")])


def measured(run, shift, flat=0.):
    "Item rows for a run and for the untrained model"
    base = Run.create(run.root, "tiny", "base", 0, dict(source=run.identity["weights"]))
    for r, s in ((run, shift), (base, 0.)):
        write_parquet(r / "evals" / "expression.parquet", rows_of(s))
        write_parquet(r / "evals" / "tiny_facts.parquet", rows_of(flat if r is run else 0., ("x",)).query("metric=='rubric'").assign(metric="acc"))


def test_panel_rows_become_tables_and_the_gate(run, monkeypatch):
    calibrated(run, monkeypatch)
    measured(run, .2, -.05)
    text = model_card(run)
    assert body(text)[0] == TOP and "differs from the untrained model's by +0.200 (95 % interval +0.200 to +0.200, level checkpoint)" in text
    assert "| ask\\.feeling | 8 | 0.535 | 0.335 | +0.200 ± 0.000 |" in text and "| plain | 8 |" in text
    assert "| tiny\\_facts | acc | 8 | 0.285 | 0.335 | -0.050 ± 0.000 | checkpoint |" in text and "Not evaluated" not in text


def test_a_gate_that_the_panel_does_not_pass_is_in_the_first_line(run, monkeypatch):
    calibrated(run, monkeypatch)
    measured(run, 0.)
    assert "the training did not take" in body(model_card(run))[0]


def test_another_models_panel_is_not_compared(run):
    measured(run, .2)
    base = next((run.root / "tiny" / "base").glob("*/config.json"))
    saved = json.loads(base.read_text())
    base.write_text(json.dumps(saved | dict(identity=saved["identity"] | dict(source="sha256:other"))))
    assert "not measured | |" in model_card(run)


def test_an_interval_needs_two_clusters():
    rows = lambda v: pd.DataFrame(dict(item_id=["a", "b"], cluster="c", value=v))
    d, half, n = difference(rows([.5, .7]), rows([.5, None]))
    assert (d, n) == (0., 1) and half != half


# --- writing and publishing ----------------------------------------------------------------------------------

def test_a_card_is_written_and_written_again(run):
    path = write_card(run)
    before = path.read_bytes()
    assert path == run / "adapter" / "README.md" and before.decode() == model_card(run) and write_card(run).read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_no_card_without_an_adapter_or_for_the_untrained(run):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="found no adapter/adapter_model.safetensors"): write_card(run)
    with pytest.raises(UserError, match="found no rubric and arm in config.json"): model_card(Run.create(run.root, "tiny", "base", 0, {}))


class Hub:
    "What push asks of the hub"
    fail, public, calls = None, False, []
    def __init__(self): Hub.calls = []
    def _do(self, name, **kw):
        Hub.calls.append((name, kw))
        if Hub.fail and name in Hub.fail: raise Hub.fail[name]
    def whoami(self): self._do("whoami")
    def create_repo(self, repo_id, **kw): self._do("create_repo", repo_id=repo_id, **kw); return f"https://huggingface.co/{repo_id}"
    def repo_info(self, repo_id): return SimpleNamespace(private=not Hub.public)
    def upload_folder(self, repo_id, folder_path, **kw):
        from pathlib import Path
        self._do("upload_folder", repo_id=repo_id, files={p.name: p.read_bytes() for p in Path(folder_path).iterdir()})


@pytest.fixture
def hub(monkeypatch):
    Hub.fail, Hub.public, Hub.calls = None, False, []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def answered(status): return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co")))


def test_four_files_at_most_leave(run, hub):
    write_card(run)
    (run / "adapter" / "training_args.bin").write_bytes(b"pickle")
    assert push(run, "me/expressive") == "https://huggingface.co/me/expressive"
    assert [c[0] for c in hub.calls] == ["whoami", "create_repo", "upload_folder"] and hub.calls[1][1]["private"] is True
    files = hub.calls[2][1]["files"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes() and json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"


def test_a_notice_goes_along_where_the_licence_asks_for_one(run, hub):
    run.update_json("config.json", dict(model="llama3.2-3b"))
    write_card(run)
    with pytest.raises(UserError, match="a name that begins with Llama, such as Llama-expressive"): push(run, "me/expressive")
    push(run, "me/Llama-expressive", private=False)
    assert b"Llama 3.2 Community License, Copyright" in hub.calls[2][1]["files"]["NOTICE"] and hub.calls[1][1]["private"] is False
    assert json.loads(hub.calls[2][1]["files"]["adapter_config.json"])["base_model_name_or_path"] == "meta-llama/Llama-3.2-3B-Instruct"


def test_an_adapter_without_our_card_stays(run, hub):
    (run / "adapter" / "README.md").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no model card"): push(run, "me/expressive")
    (run / "adapter" / "README.md").write_text("# Model Card for Model ID\n")
    with pytest.raises(UserError, match="has no model card"): push(run, "me/expressive")
    assert hub.calls == []


def test_private_means_private(run, hub):
    write_card(run)
    hub.public = True
    with pytest.raises(UserError, match="exists and is public"): push(run, "me/expressive")
    assert "upload_folder" not in [c[0] for c in hub.calls]
    push(run, "me/expressive", private=False)


@pytest.mark.parametrize(("where", "error", "says"), [
    ("whoami", LocalTokenNotFoundError("no"), "no token was found; log in with `hf auth login`"), ("whoami", OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE"), ("whoami", answered(401), "the token is not valid"),
    ("create_repo", answered(403), "may not write to me/expressive"), ("upload_folder", answered(500), "answered 500"), ("whoami", httpx.ConnectError("no"), "cannot be reached .ConnectError."),
    ("upload_folder", TimeoutError("no"), "cannot be reached"), ("upload_folder", httpx.ReadTimeout("no"), "cannot be reached")])
def test_every_failure_is_one_line(run, hub, where, error, says):
    write_card(run)
    hub.fail = {where: error}
    with pytest.raises(UserError, match=says) as e: push(run, "me/expressive")
    assert str(e.value).startswith("push_to_hub: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["expressive", "a/b/c", "me/with space", ""])
def test_a_name_that_is_none_is_refused(run, hub, name):
    write_card(run)
    with pytest.raises(UserError, match="allowed: owner/name"): push(run, name)


def test_offline_for_real(run, monkeypatch):
    "No fake: this session runs with HF_HUB_OFFLINE"
    write_card(run)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"): push(run, "me/expressive")
