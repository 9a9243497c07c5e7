"""The interface of hmx_feel as text: what each module exports, and the fields of each config.

To accept a change of the interface: python tests/interface.py > tests/interface.txt
"""
import ast
from pathlib import Path

package = Path(__file__).resolve().parents[1] / "hmx_feel"


def modules():
    "Names and sources of the exported modules, without importing them"
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted(package.glob("*.py")) if not p.stem.startswith("_")}


def exported(source):
    "What `__all__` of a module names"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise AssertionError("a module without __all__")


def configs():
    "Every config with its fields: name, type, default"
    import hmx_feel.runs as runs
    for name in exported(modules()["runs"]):
        fields = getattr(getattr(runs, name), "model_fields", {})
        if not name.endswith("Config") or not fields: continue
        yield f"{name}"
        for field, info in fields.items():
            kind = getattr(info.annotation, "__name__", None) if isinstance(info.annotation, type) else str(info.annotation)
            yield f"    {field}: {kind} = {info.default!r}"


def interface():
    "One line a module, then the configs"
    names = [f"hmx_feel.{name}: {', '.join(exported(source))}" for name, source in modules().items()]
    return "\n".join([*names, "", *configs()]) + "\n"


if __name__ == "__main__": print(interface(), end="")
