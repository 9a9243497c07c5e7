"Numbers of a benchmark that several programs measure: one flat file, and beside it when and at which commit each was measured"
from datetime import datetime, timezone
from pathlib import Path

from hmx_feel.runs import environment, read_json, write_json


def merge(folder, name, numbers, **facts):
    "Add to name.json, and what was true while they were measured to name_env.json, number by number"
    about = dict(environment(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts)
    for file, new in ((f"{name}.json", numbers), (f"{name}_env.json", dict.fromkeys(numbers, about))):
        path = Path(folder) / file
        write_json(path, (read_json(path) if path.is_file() else {}) | new)
