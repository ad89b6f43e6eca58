"""Print the lowest version that pyproject.toml allows of each dependency, as constraints of pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    bound = re.fullmatch(r"([\w-]+)>=([\w.]+)(,.*)?", requirement)
    if bound is None:
        raise SystemExit(f"{requirement!r} has no lower bound")
    print(f"{bound[1]}=={bound[2]}")
