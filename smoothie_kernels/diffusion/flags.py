"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with defaults, where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, argparse.SUPPRESS)
        return f"{action.help}" if silent else f"{action.help} (default: %(default)s)"


def from_config(arguments: list[str]) -> list[str]:
    """The options of a --config file, as flags."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", type=Path)
    path = parser.parse_known_args(arguments)[0].config
    if path is None:
        return []
    if not path.is_file():
        raise ValueError(f"config must be a file, got {str(path)!r}")
    try:
        options = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML or JSON, got {str(path)!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config must hold options by name, got {type(options).__name__} in {str(path)!r}")
    return [
        f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
        for name, value in options.items()
        if value is not None
    ]
