"""Build the site in _docs: in a copy of the checkout, run the experiment notebooks on tiny, then let nbdev and Quarto render it.

The notebooks in git stay without outputs, so the copy is what gets executed and rendered.
"""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

top = Path(__file__).resolve().parents[1]
bin_dir = Path(sys.executable).parent


def copy_checkout(to):
    "What git tracks or would track, as it stands now; links stay links."
    names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=top, check=True, capture_output=True, text=True)
    for name in filter(None, names.stdout.split("\0")):
        source, target = top / name, to / name
        if not os.path.lexists(source): continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


def execute(copy, env):
    "The main job, so that there are runs to compare; then each experiment notebook in place."
    subprocess.run([bin_dir / "hmx-feel", "demo"], cwd=copy, env=env, check=True)
    for notebook in sorted((copy / "nbs").glob("0*.ipynb")):
        again = ["-p", "replace", "True"] if '"replace = ' in notebook.read_text(encoding="utf-8") else []
        subprocess.run([bin_dir / "papermill", notebook, notebook, "--cwd", copy / "nbs", *again], env=env, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-execute", action="store_true", help="render the experiment notebooks without outputs")
    args = parser.parse_args()
    copy = top / "build" / "site"
    shutil.rmtree(copy, ignore_errors=True)
    copy_checkout(copy)
    env = os.environ | {"HMX_RUNS": str(top / "build" / "site-runs"), "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    if not args.no_execute:
        shutil.rmtree(env["HMX_RUNS"], ignore_errors=True)
        execute(copy, env)
    subprocess.run([bin_dir / "nbdev_docs"], cwd=copy, env=env, check=True)
    shutil.rmtree(top / "_docs", ignore_errors=True)
    shutil.move(copy / "_docs", top / "_docs")
    print("The site is in _docs; open _docs/index.html")


if __name__ == "__main__": main()
