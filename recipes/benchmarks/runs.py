"""The file that a comparison keeps its finished runs in: one JSON object a line, added as soon as a run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from training import to_json


class RunLog:
    """Runs by their `key`, the settings that decide their result.

    A run that failed is in the file as well, with its message in `failed`; it counts as not done. A last line without
    its end, from a process that was killed while it wrote, is cut off.

    Args:
        path: the file; its folder is made when the first run is added.

    Raises:
        ValueError: if a whole line is not a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                run = json.loads(line)
                self._runs[_name(run["key"])] = run
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"line {number} of {path} is not a run ({error!r}): delete the line") from None
        if whole != content:
            os.truncate(path, len(whole))

    def finished(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Look up a run.

        Args:
            key: its settings.

        Returns:
            The run, or None when it has not been done, or failed.
        """
        run = self._runs.get(_name(key))
        return None if run is None or "failed" in run else run

    def failure(self, key: dict[str, Any]) -> str | None:
        """Look up why a run failed.

        Args:
            key: its settings.

        Returns:
            The message, or None when it has not been done, or did not fail.
        """
        return self._runs.get(_name(key), {}).get("failed")

    def add(self, run: dict[str, Any]) -> None:
        """Add a run, on the disk when this returns.

        Args:
            run: what to keep, with the settings in `key`, and the message in `failed` if it did.
        """
        line = to_json(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._runs[_name(run["key"])] = json.loads(line)  # as a later start will read it


def _name(key: dict[str, Any]) -> str:
    return json.dumps(json.loads(to_json(key)), sort_keys=True)
