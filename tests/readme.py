"""The README's two commands: ``python tests/readme.py run`` or ``test`` prints one."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def commands() -> dict[str, str]:
    """The shell blocks behind the markers ``<!-- command: run -->`` and ``<!-- command: test -->``."""
    found = re.findall(r"<!-- command: (\w+) -->\n+```sh\n(.*?)\n```", README.read_text(), re.DOTALL)
    return dict(found)


if __name__ == "__main__":
    print(commands()[sys.argv[1]])
