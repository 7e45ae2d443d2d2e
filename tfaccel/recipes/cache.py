"""What a run has finished: a hash of everything a step depends on, and the file it made."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tfaccel.core.artifacts import sha256, write_json


def hash_of(*parts: Any) -> str:
    """Returns the SHA-256 of values that JSON can hold, whatever the order of their keys.

    >>> hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class StepCache:
    """Finished steps of one run, each with its hash, file and facts.

    A step counts as finished only while its hash is the same and its file is, byte for byte, the
    one that was written. So a changed recipe, an edited file and a half-copied folder all lead to
    the step being done again.

    Args:
        path: JSON file that the cache is kept in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            # No cache, or one that an editor broke: every step is done anew.
            return
        if isinstance(content, dict):
            self._steps = {k: v for k, v in content.items() if isinstance(v, dict)}

    def find(self, step: str, key: str, file: Path) -> dict[str, Any] | None:
        """Returns the facts of a finished step, or None if it is to be done.

        Args:
            step: its name, such as "teacher.model".
            key: hash of everything that it depends on.
            file: what it makes.
        """
        entry = self._steps.get(step)
        if entry is None or entry.get("key") != key or not file.is_file():
            return None
        if sha256(file) != entry.get("sha256"):
            return None
        facts = entry.get("facts")
        return facts if isinstance(facts, dict) else None

    def keep(self, step: str, key: str, file: Path, facts: dict[str, Any]) -> None:
        """Notes a step as finished, and writes the cache."""
        self._steps[step] = {"key": key, "sha256": sha256(file), "facts": facts}
        write_json(self._path, self._steps)
