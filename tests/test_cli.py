"""The command `hmx-feel`: every mistake is one line, nothing is left half-written, and no kernel starts for it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import standins

from hmx_feel import cli, sweep
from hmx_feel.rubric import load_rubric
from hmx_feel.runs import UserError, data_path

command = Path(sys.executable).with_name("hmx-feel")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    "Run the command in this process; a kernel would be an error. Returns exit code, stdout, stderr."
    monkeypatch.setenv("HMX_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    def started(*_, **__): raise AssertionError("a kernel was started")
    monkeypatch.setattr(cli, "run_notebook", started)
    def call(*argv):
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def refused(call, tmp_path):
    "Expect the command to be refused in one line that holds the given pieces"
    def refused(argv, *pieces):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(*argv)
        assert_one_line(code, out, err, pieces)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return refused


def assert_one_line(code, out, err, pieces):
    assert code == 2, err
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("hmx-feel: "), err
    assert "Traceback" not in err
    for piece in pieces: assert piece in err


def process(*argv, timeout=60, **env):
    "Run the command as a user does; returns exit code, stdout, stderr"
    full = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN")} | env
    done = subprocess.run([str(command), *map(str, argv)], env=full, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


# --- values --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "pieces"), [
    ("train --modle tiny", ["unknown option '--modle'", "(nearest: '--model')"]),
    ("train --arm forwrad", ["arm", "'forwrad'", "(nearest: 'forward')"]),
    ("train --arm base", ["arm", "'base'", "untrained"]),
    ("train --arm prompted", ["prompted", "not trained"]),
    ("train --steps -3", ["steps: found '-3'", "allowed: a whole number >= 1"]),
    ("train --steps 2.5", ["steps: found '2.5'", "allowed: a whole number"]),
    ("train --steps", ["--steps", "expected one argument"]),
    ("train --seed x", ["seed: found 'x'", "allowed: a whole number >= 0"]),
    ("train --lr nan", ["lr: found 'nan'", "allowed: a number > 0"]),
    ("train --group-size 6", ["completions_per_step", "group_size"]),
    ("train --judge bose", ["judge", "'bose'", "(nearest: 'base')"]),
    ("train --dtype bf16", ["dtype: found 'bf16'", "bfloat16"]),
    ("train --train-kinds situaton", ["train_kinds", "'situaton'", "(nearest: 'situation')"]),
    ("train tiny", ["unknown argument 'tiny'"]),
    ("train --model qwen-0.6b", ["'qwen-0.6b'", "(nearest: 'qwen3-0.6b')"]),
    ("trian", ["unknown command 'trian'", "(nearest: 'train')"]),
    ("evaluate --arm forward", ["no finished run of tiny forward seed 0", "finished: none"]),
    ("evaluate --panel tiyn", ["'tiyn'", "(nearest: 'tiny')"]),
    ("evaluate --run nowhere", ["nowhere", "no such run folder"]),
    ("evaluate --benchmarks nowhere", ["benchmarks", "'nowhere'", "a folder"]),
    ("evaluate --samples 0", ["samples: found '0'", "allowed: a whole number >= 1"]),
    ("calibrate --answers nowhere.jsonl", ["answers", "'nowhere.jsonl'"]),
    ("calibrate --rubric hmx-fell", ["'hmx-fell'", "(nearest: 'hmx-feel')"]),
    ("compare", ["no finished run of tiny"]),
    ("compare --alpha 2", ["alpha: found '2'"]),
    ("figures", ["no finished run of tiny"]),
    ("demo --workers x", ["--workers", "'x'"]),
    ("demo --workers 0", ["workers: found 0"]),
    ("rubric check nowhere.yaml", ["nowhere.yaml"]),
    ("rubric chekc hmx-feel", ["chekc"]),
    ("judge calibrat", ["judge: found 'calibrat'", "allowed: calibrate"]),
    ("judge calibrate --rubric hmx-fell", ["(nearest: 'hmx-feel')"]),
    ("grid paln tiny", ["grid: found 'paln'", "(nearest: 'plan')"]),
    ("grid plan tinny", ["grid: found 'tinny'", "(nearest: 'tiny')"]),
    ("grid status nowhere.yaml", ["'nowhere.yaml'", "paper, smoke, tiny"]),
    ("grid run smoke --executor rai", ["executor: found 'rai'", "(nearest: 'ray')"]),
    ("grid run smoke --executor local --address head:6379", ["'head:6379'", "executor=ray"]),
    ("grid run smoke --workers -1", ["workers: found -1"]),
    ("grid run smoke --retries x", ["--retries", "'x'"]),
    ("grid run smoke --wrokers 2", ["unknown option '--wrokers'", "(nearest: '--workers')"]),
    ("score nowhere.jsonl", ["nowhere.jsonl: no such file"]),
    ("score", ["required: answers"]),
    ("doctor --wait x", ["--wait", "'x'"]),
])
def test_mistyped(refused, argv, pieces): refused(argv.split(), *pieces)


# --- models --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def qwen3(tmp_path_factory): return standins.make_standin("qwen3", tmp_path_factory.mktemp("standins") / "qwen3")


def test_model_folder_that_does_not_exist(refused):
    refused(["train", "--model", "./nowhere"], "no folder", "'./nowhere'")


def test_model_folder_without_config(refused, qwen3, tmp_path):
    folder = standins.without(qwen3, tmp_path / "model", file="config.json")
    refused(["train", "--model", folder], str(folder), "no config.json")


def test_model_folder_without_safetensors(refused, qwen3, tmp_path):
    folder = standins.without(qwen3, tmp_path / "model", file="model.safetensors")
    refused(["train", "--model", folder], str(folder), "no *.safetensors")


def test_tokenizer_without_chat_template(refused, qwen3, tmp_path):
    folder = standins.without(qwen3, tmp_path / "model", chat_template=True)
    refused(["train", "--model", folder], str(folder), "no chat template")


@pytest.mark.parametrize("verb", ["train", "evaluate", "calibrate"])
def test_model_that_is_a_file(refused, tmp_path, verb):
    (tmp_path / "model").write_text("")
    refused([verb, "--model", tmp_path / "model"], "is a file")


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "unreachable"])
def test_hub_unreachable(env, tmp_path):
    start = time.time()
    code, out, err = process("train", "--model", "qwen3-0.6b", HF_HOME=str(tmp_path / "hf"), HMX_RUNS=str(tmp_path / "runs"), **env)
    assert time.time() - start < 30
    assert_one_line(code, out, err, ["Qwen/Qwen3-0.6B", "qwen3-0.6b", "cannot be reached", "pass its folder", "model path/to/Qwen3-0.6B"])
    assert not (tmp_path / "runs").exists()


def test_gated_model(refused, monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError
    from hmx_feel import policy
    def gated(*_, **__): raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))
    monkeypatch.setattr(policy, "_hub_config", gated)
    refused(["train", "--model", "llama3.2-3b"], "gated", "https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct", "hf auth login")


# --- rubrics and prompts -------------------------------------------------------------------------------------

def broken_rubric(change):
    "The shipped rubric as JSON text, after a change"
    raw = load_rubric("hmx-feel").model_dump(mode="json", exclude_defaults=True)
    change(raw)
    return json.dumps(raw)


def drop(raw): del raw["referent"]
def drop_question(raw): del raw["criteria"][1]["question"]
def repeat(raw): raw["criteria"][1]["id"] = raw["criteria"][0]["id"]
def mistype(raw): raw["criterai"] = raw.pop("criteria")


def weightless(raw):
    for c in raw["criteria"]: c["weight"] = 0


RUBRICS = {
    "not-yaml": ("criteria: [unclosed", ["not YAML", "line 1"]),
    "a-list": ("- one\n- two\n", ["found list", "a mapping"]),
    "lacks-a-field": (broken_rubric(drop), ["referent: missing"]),
    "lacks-a-question": (broken_rubric(drop_question), ["feeling.cause.question: missing"]),
    "unknown-field": (broken_rubric(mistype), ["'criterai'", "(nearest: 'criteria')"]),
    "repeats-an-id": (broken_rubric(repeat), ["'feeling.shade' twice"]),
    "weights-sum-to-0": (broken_rubric(weightless), ["weights that sum to 0"]),
}


@pytest.mark.parametrize(("text", "pieces"), RUBRICS.values(), ids=list(RUBRICS))
@pytest.mark.parametrize("argv", [("train", "--rubric"), ("calibrate", "--rubric"), ("rubric", "check")], ids=["train", "calibrate", "check"])
def test_broken_rubric(refused, tmp_path, argv, text, pieces):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    refused([*argv, file], "mine.yaml", *pieces)


def prompt_lines(*splits):
    "Lines of a prompts file: the shipped prompts of some splits"
    lines = data_path("prompts", "hmx-feel").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["split"] in splits]


PROMPTS = {
    "broken-line": (lambda: [*prompt_lines("train")[:3], '{"id": "x", ', *prompt_lines("probe")[:2]], ["line 4", "JSON"]),
    "torn-last-line": (lambda: [*prompt_lines("train")[:3], '{"id": "x", '], ["line 4", "JSON"]),
    "lacks-a-field": (lambda: [*prompt_lines("train")[:2], '{"id": "x"}'], ["line 3", "missing"]),
    "duplicate-ids": (lambda: [*prompt_lines("train")[:3], prompt_lines("train")[1]], ["line 4", "line 2", "each id once"]),
    "no-train-split": (lambda: prompt_lines("probe"), ["train", "probe"]),
    "empty": (list, ["no prompts"]),
}


@pytest.mark.parametrize(("lines", "pieces"), PROMPTS.values(), ids=list(PROMPTS))
def test_broken_prompts(refused, tmp_path, lines, pieces):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines()))
    refused(["train", "--prompts", file], *pieces)


def test_prompts_that_are_not_there(refused): refused(["train", "--prompts", "hmx-fele"], "'hmx-fele'", "(nearest: 'hmx-feel')")


# --- grids and answers ---------------------------------------------------------------------------------------

GRID = dict(name="mine", models=["tiny"], arms=["forward", "reverse"], seeds=[0, 1])
GRIDS = {
    "unknown-key": (dict(modles=["tiny"]), ["unknown key 'modles'", "(nearest: 'models')"]),
    "empty-list": (dict(arms=[]), ["arms: found []", "not empty"]),
    "no-seeds": (dict(seeds=[]), ["seeds: found none for tiny"]),
    "model-twice": (dict(models=["tiny", "tiny"]), ["models: found 'tiny' twice"]),
    "arm-twice": (dict(arms=["forward", "forward"]), ["arms: found 'forward' twice"]),
    "seed-twice": (dict(seeds=[1, 1]), ["seeds: found 1 twice"]),
    "seeds-that-are-text": (dict(seeds=["x"]), ["seeds: found 'x'", "whole numbers"]),
    "seeds-of-a-half": (dict(seeds=[0, 1.5]), ["seeds: found 1.5", "whole numbers"]),
    "seeds-of-another-model": (dict(seeds=dict(tinny=[0], default=[1])), ["found 'tinny'", "(nearest: 'tiny')"]),
    "no-such-arm": (dict(arms=["forwrad"]), ["arms: arm: found 'forwrad'", "(nearest: 'forward')"]),
    "no-such-panel": (dict(evaluate=dict(panel="tiyn")), ["evaluate.panel: found 'tiyn'", "(nearest: 'tiny')"]),
    "no-such-parameter": (dict(train=dict(stpes=3)), ["train: unknown parameter 'stpes'", "(nearest: 'steps')"]),
    "wrong-value-on-an-axis": (dict(train=dict(steps=[3, 0])), ["train: steps: found 0"]),
    "what-the-grid-sets": (dict(train=dict(seed=3)), ["found 'seed'", "the grid sets itself"]),
    "nothing-trained": (dict(arms=["prompted"]), ["arms: found none that is trained"]),
}


@pytest.mark.parametrize(("change", "pieces"), GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_broken_grid(refused, tmp_path, verb, change, pieces):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(GRID | change))
    refused(["grid", verb, file], "mine.yaml", *pieces)


def test_an_arm_that_needs_what_its_rubric_lacks(refused, tmp_path):
    (tmp_path / "bare.json").write_text(broken_rubric(lambda raw: [c.pop("inverted", None) for c in raw["criteria"]]))
    (tmp_path / "mine.yaml").write_text(json.dumps(GRID | dict(arms=["forward", "inverted"], train=dict(rubric=str(tmp_path / "bare.json")))))
    refused(["grid", "run", tmp_path / "mine.yaml"], "mine.yaml: arm inverted", "inverted: missing")


@pytest.mark.parametrize(("line", "pieces"), [('{"prompt": "Why?", ', ["line 2", "JSON"]), ('{"prompt": "Why?"}', ["line 2: answer: found None"]), ('{"answer": "x"}', ["line 2: found no prompt"])])
def test_answers_with_a_broken_line(refused, tmp_path, line, pieces):
    (tmp_path / "mine.jsonl").write_text(json.dumps(dict(prompt="Why?", answer="Because.")) + "\n" + line + "\n")
    refused(["score", tmp_path / "mine.jsonl"], "mine.jsonl", *pieces)


def test_score(call, tmp_path):
    "One row per answer and criterion, in the order of the file, whatever order they were judged in"
    import pandas as pd
    said = ["I notice a quiet relief that differs from joy, because you told me about the dog.", "Water boils at 100 degrees.", ""]
    rows = [dict(prompt=q, answer=a, author=str(n)) for n, (q, a) in enumerate((q, a) for a in said for q in ("How is it for you?", "And now?"))]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, err = call("score", tmp_path / "mine.jsonl")
    table = pd.read_csv(tmp_path / "mine-scores.csv", dtype=dict(author=str))
    assert code == 0 and out.startswith("6 answers by tiny, rubric hmx-feel") and "has not been calibrated" in out
    assert len(table) == 6 * len(load_rubric("hmx-feel").all) and table.score.dropna().between(0, 1).all() and list(table.author.unique()) == list("012345")
    alone = dict(rows[2], id="alone")
    (tmp_path / "one.jsonl").write_text(json.dumps(alone) + "\n")
    assert call("score", tmp_path / "one.jsonl", "--out", tmp_path / "one.parquet")[0] == 0
    one = pd.read_parquet(tmp_path / "one.parquet")
    assert abs(one.score.to_numpy() - table[table.line == 3].score.to_numpy()).max() < 1e-4


def test_doctor_names_a_broken_pin_a_missing_extra_and_an_unreachable_hub(call, monkeypatch):
    from hmx_feel import doctor
    version, spec = doctor._version, doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor, "_version", lambda name: "1.15.0" if name == "trl" else version(name))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "ray" else spec(name))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value in dict(HF_ENDPOINT="http://127.0.0.1:9", HMX_OFFLINE="1", HMX_CACHE="none").items(): monkeypatch.setenv(name, value)
    monkeypatch.delenv("HMX_BENCHMARKS", raising=False)
    start = time.monotonic()
    code, out, err = call("doctor")
    assert time.monotonic() - start < 30 and (code, err) == (1, "")
    for piece in ("trl", "1.15.0, needed: <1.13,>=1.12", "its GRPO calls a Triton kernel", "pip install 'hmx-feel[ray]'", "http://127.0.0.1:9 cannot be reached", "files in none; downloads are switched off, so tasks that need the others are skipped", "things to mend"): assert piece in out, out


# --- places --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("verb", ["train", "evaluate", "calibrate", "compare", "figures", "demo"])
def test_output_below_a_file(refused, tmp_path, verb):
    (tmp_path / "file").write_text("")
    refused([verb, "--runs", tmp_path / "file" / "runs"], "cannot be written", "is not a folder")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc: nothing here is unwritable for every user")
def test_output_folder_that_refuses(refused): refused(["train", "--runs", "/proc/self/runs"], "/proc/self/runs", "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(["train", "--runs", tmp_path / "locked" / "runs"], "cannot be written", "Permission denied")


@pytest.fixture
def finished(qwen3, tmp_path, monkeypatch):
    "A run that is finished, without the hours that it would take"
    from hmx_feel.grpo import check_run, open_run
    from hmx_feel.runs import TrainConfig
    return open_run(check_run(TrainConfig(model=str(qwen3), steps=2, runs=str(tmp_path / "runs")))).finish({})


def test_a_report_on_a_finished_run_is_no_second_run(finished, qwen3, tmp_path):
    from hmx_feel.cli import check_train
    from hmx_feel.runs import TrainConfig
    from hmx_feel.rubric import Rubric, load_arm
    finished.update_json("config.json", dict(resolved=dict(model=str(qwen3), steps=2), arm_data=load_arm("forward").model_dump(), rubric=Rubric.load("hmx-feel").model_dump()))
    check_train(TrainConfig(run=str(finished.path), model=str(qwen3), steps=2, runs=str(tmp_path / "runs")))


@pytest.mark.parametrize("option, says", [(["--seed", "99999999999"], ["seed", "4294967295"]), (["--steps", "9" * 20], ["steps", "1000000"]), (["--temperature", "1e-300"], ["temperature", "0.01"]), (["--dimensions", "surprse"], ["dimensions: found 'surprse'"]), (["--outside-judges", "nosuch"], ["outside_judges: "])])
def test_numbers_and_names_out_of_range(refused, option, says): refused(["train", *option], *says)


def test_a_finished_run_is_not_done_again(refused, finished, qwen3):
    refused(["train", "--model", qwen3, "--steps", "2"], str(finished.path), "is finished", "--replace", "--seed")


def test_a_run_on_other_weights_is_not_measured(refused, finished, qwen3, tmp_path):
    "The model's folder has changed since the training"
    config = finished.read_json("config.json")
    finished.update_json("config.json", dict(identity=config["identity"] | dict(weights="sha256:" + "0" * 64)))
    refused(["evaluate", "--model", qwen3, "--arm", "forward"], f"{finished.path}: was made with weights sha256:000000000000...", "is now sha256:", "pass the revision or folder")


@pytest.mark.parametrize("other", ["--replace", "--seed 1", "--steps 3", "--arm reverse"])
def test_another_run_is_let_through(call, finished, qwen3, monkeypatch, tmp_path, other):
    monkeypatch.setattr(cli, "run_notebook", lambda *_: tmp_path / "report.ipynb")
    assert call("train", "--model", qwen3, "--steps", "2", *other.split())[::2] == (0, "")


# --- the command itself --------------------------------------------------------------------------------------

def test_version(): assert process("--version") == (0, f"hmx-feel {cli.hmx_feel.__version__}\n", "")


def test_help_is_quick_and_light():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        code, out, err = process("--help")
        took.append(time.perf_counter() - start)
        assert (code, err) == (0, "") and all(f"  {name}" in out for name in [*cli.NOTEBOOKS, *cli.OTHERS])
    assert min(took) < .5
    heavy = "import sys; from hmx_feel.cli import main; main(['--help']); print(*sorted({'torch', 'transformers', 'papermill', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.endswith("version.\n\n")


@pytest.mark.parametrize("verb", cli.NOTEBOOKS)
def test_options_are_the_fields(verb):
    fields = cli.config_class(cli.NOTEBOOKS[verb][0]).model_fields
    code, out, err = process(verb, "--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for name, field in fields.items():
        assert f"{cli.option(name)} " in text or f"{cli.option(name)}," in text
        assert field.description, f"{name} has no description"
    actions = {a.dest: a for a in cli.make_parser(verb)._actions if a.dest != "help"}
    assert set(actions) == set(fields)
    for name, field in fields.items(): assert field.description in actions[name].help and "default: " in actions[name].help


def test_a_mistake_as_a_process(tmp_path):
    assert_one_line(*process("train", "--arm", "forwrad", HMX_RUNS=str(tmp_path / "runs")), ["(nearest: 'forward')"])
    assert not (tmp_path / "runs").exists()


def test_versions_in_range_that_do_not_import_are_found(tmp_path, monkeypatch):
    from hmx_feel.doctor import check_imports
    for name, text in dict(lower="def new(): pass", upper="from lower import old", top="import upper").items(): (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [f.state for f in check_imports(("lower.new",))] == ["ok"]
    [found] = check_imports(("lower", "upper", "top"))
    assert found.state == "bad" and found.found.startswith("upper cannot be imported (ImportError: cannot import name 'old'") and found.cure.endswith("--force-reinstall upper")
    (tmp_path / "upper.py").write_text("import os; os._exit(7)")
    assert "exit code 7" in check_imports(("lower", "upper"))[0].found


def test_a_package_that_does_not_import_is_one_line(call, monkeypatch):
    def broken(config): raise ImportError("cannot import name 'HybridCache' from 'transformers'")
    monkeypatch.setitem(cli.CHECKS, "train", broken)
    code, out, err = call("train", "--steps", "1")
    assert (code, out) == (2, "") and "HybridCache" in err and err.count("\n") == 1 and "hmx-feel doctor" in err


def test_rubric_check(call):
    code, out, err = call("rubric", "check", "hmx-feel")
    r = load_rubric("hmx-feel")
    assert (code, err) == (0, "") and r.hash[:8] in out and "9 criteria in 3 dimensions" in out


def test_options_reach_the_notebook(call, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "check_train", lambda config: None)
    monkeypatch.setitem(cli.CHECKS, "train", lambda config: None)
    monkeypatch.setattr(cli, "run_notebook", lambda name, params, out: asked.append((name, params)) or tmp_path / "report.ipynb")
    code, out, err = call("train", "--model", "tiny", "--arm", "reverse", "--seed", "1", "--max-completion", "32", "--lr", "1e-3", "--replace")
    assert (code, out, err) == (0, f"{tmp_path / 'report.ipynb'}\n", "")
    assert asked == [("03_train", dict(arm="reverse", seed=1, max_completion=32, lr=1e-3, replace=True))]


# --- kernels -------------------------------------------------------------------------------------------------

def write_notebook(path, *code):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("who = 'nobody'", metadata=dict(tags=["parameters"]))])
    nb.cells += map(nbformat.v4.new_code_cell, code)
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, path)
    return path


def test_the_kernel_is_this_python_whatever_is_registered(tmp_path):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps(dict(argv=["/bin/false", "{connection_file}"], display_name="elsewhere", language="python")))
    nb = write_notebook(tmp_path / "which.ipynb", "import sys; print(sys.executable)")
    code = f"from hmx_feel.sweep import run_notebook; run_notebook({str(nb)!r}, {{}}, {str(tmp_path / 'out.ipynb')!r}, progress=False)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JUPYTER_PATH": str(tmp_path / "jupyter")}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text == f"{sys.executable}\n"


def test_a_users_mistake_inside_a_kernel_is_its_one_line(tmp_path):
    nb = write_notebook(tmp_path / "slip.ipynb", "from hmx_feel.runs import UserError", "raise UserError('steps: found -3,\\nallowed: more')")
    with pytest.raises(UserError, match="^steps: found -3, allowed: more$"):
        sweep.run_notebook(nb, {}, tmp_path / "made" / "out.ipynb", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["slip.ipynb"]


def test_a_broken_notebook_is_one_line_and_keeps_its_copy(monkeypatch, capsys, tmp_path):
    nb = write_notebook(tmp_path / "bug.ipynb", "1/0")
    monkeypatch.setattr(cli, "dispatch", lambda argv: sweep.run_notebook(nb, {}, tmp_path / "out.ipynb", progress=False))
    assert cli.main([]) == 1
    err = capsys.readouterr().err
    assert err == f"hmx-feel: bug stopped with ZeroDivisionError: division by zero; the executed copy is {tmp_path / 'out-failed.ipynb'}\n"
    assert (tmp_path / "out-failed.ipynb").exists() and not (tmp_path / "out.ipynb").exists()


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc to see whether a kernel is gone")
@pytest.mark.parametrize("how", ["alone", "parallel"])
@pytest.mark.parametrize("whom", ["terminal", "process"])
def test_ctrl_c(tmp_path, how, whom):
    "Ctrl-C reaches every process of a terminal, `kill -INT` only one; both end everything and print one line"
    nb = write_notebook(tmp_path / "slow.ipynb", "import os,pathlib,time", f"pathlib.Path({str(tmp_path)!r}, who).write_text(str(os.getpid()))", "time.sleep(600)")
    job = dict(alone=f"sweep.run_notebook({str(nb)!r}, dict(who='one.pid'), 'out.ipynb', progress=False)",
               parallel=f"sweep.parallel([sweep.Job(w, {str(nb)!r}, dict(who=w+'.pid'), w+'.ipynb') for w in ('one','two')], say=len)")[how]
    script = tmp_path / "go.py"
    script.write_text(f"import sys\nfrom hmx_feel import cli, sweep\nif __name__ == '__main__':\n    cli.dispatch = lambda argv: {job}\n    sys.exit(cli.main([]))\n")
    p = subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pids = [tmp_path / f"{w}.pid" for w in ("one", "two")[:1 + (how == "parallel")]]
    try:
        deadline = time.time() + 40
        while not all(f.exists() and f.read_text() for f in pids):
            assert time.time() < deadline and p.poll() is None, p.stderr.read() if p.poll() is not None else "no kernel came up"
            time.sleep(.1)
        time.sleep(.5)
        os.killpg(p.pid, signal.SIGINT) if whom == "terminal" else p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=30)
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    assert (p.returncode, out, err) == (130, "", "hmx-feel: interrupted\n")
    deadline = time.time() + 5
    while any(alive(f.read_text()) for f in pids) and time.time() < deadline: time.sleep(.1)
    assert not any(alive(f.read_text()) for f in pids), "a kernel is still alive"
    assert not list(tmp_path.glob("*out*.ipynb")) and not (tmp_path / "one.ipynb").exists()


# --- the stand-ins keep their families' rules ----------------------------------------------------------------

@pytest.mark.parametrize("family", standins.FAMILIES)
def test_standins(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = standins.make_standin(family, tmp_path / family)
    tok, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert net.config.max_position_embeddings >= 4096 and list(folder.glob("*.safetensors")) and len(tok) <= net.config.vocab_size
    assert all(len(tok(d, add_special_tokens=False)["input_ids"]) == 1 for d in "12345")
    text = "A late train, 3 pm: naïve?\n Yes!"
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text
    chat = [dict(role="system", content="s"), dict(role="user", content="Hello")]
    render = lambda messages, **kw: tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kw)
    if family == "qwen3":
        assert tok.bos_token is None
        assert render(chat[1:], enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert render(chat[1:]).endswith("<|im_start|>assistant\n")
    if family == "gemma2":
        assert tok("a")["input_ids"][0] == tok.bos_token_id and render(chat[1:]).startswith("<bos><start_of_turn>user\nHello")
        with pytest.raises(Exception, match="System role not supported"): render(chat)
        assert {"sliding_attention", "full_attention"} == set(net.config.layer_types) and net.config.final_logit_softcapping
    if family == "llama":
        assert tok.pad_token is None and render(chat).startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
        today = [f"Today Date: {time.strftime('%d %b %Y', time.gmtime(time.time() + s))}\n" for s in (-86400, 0, 86400)]
        assert any(t in render(chat) for t in today) and "Today Date: 26 Jul 2024\n" in render(chat, date_string="26 Jul 2024")
    with torch.no_grad(): assert net(**tok(text, return_tensors="pt")).logits.isfinite().all()
    asked = tok(render(chat[1:]), add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    said = net.generate(**asked, do_sample=True, top_k=0, num_return_sequences=32, max_new_tokens=48, pad_token_id=tok.pad_token_id or tok.eos_token_id)
    end = tok.convert_tokens_to_ids(standins.RULES[family]["ends"][-1])
    ended = (said[:, asked["input_ids"].shape[1]:] == end).any(1).float().mean()
    assert .25 < ended, "nearly all answers are cut: nothing can be learnt from them"
    assert said.shape[1] - asked["input_ids"].shape[1] > 24, "no answer says anything"


def test_standin_with_labels_of_several_tokens(caplog):
    from hmx_feel.judge import label_ids
    tok = standins.make_tokenizer("llama", split_labels=True)
    assert all(len(ids) > 1 for ids in label_ids(tok, [1, 2, 3, 4, 5]))
    assert "several tokens" in caplog.text


def test_large_standin_is_about_42_million():
    from transformers import AutoModelForCausalLM
    import torch
    tok = standins.make_tokenizer("qwen3", corpus=["a short text"] * 3)
    with torch.device("meta"): net = AutoModelForCausalLM.from_config(standins.make_config("qwen3", tok, "42m"))
    assert 38e6 < net.num_parameters() < 46e6
