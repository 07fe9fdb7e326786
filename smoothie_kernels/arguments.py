"""A parser whose complaints are one line."""

from __future__ import annotations

import argparse
import difflib
import shlex
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Options by their whole names; what is wrong is one line on stderr and exit status 2, without the usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"allow_abbrev": False} | options))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def refuse(self, unknown: list[str]) -> None:
        """The error of arguments that no option takes, if there are any."""
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unrecognized arguments: {shlex.join(unknown)}{nearest(unknown[0].partition('=')[0], known)}")


def nearest(name: str, known: list[str]) -> str:
    """What may have been meant, to stand behind a message; empty where nothing is like it."""
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ""
