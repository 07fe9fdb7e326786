"""What the parsers of `train` and `sample` share."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from smoothie_kernels import arguments

TRUTH = "tag:yaml.org,2002:bool"
NOTHING = "tag:yaml.org,2002:null"


@contextmanager
def named(argument: str, option: str) -> Iterator[None]:
    """Calls an argument by its option's name in what is refused inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(rf"\b{argument}\b", option, str(error))) from error


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with defaults, where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))  # 0 says something
        return f"{action.help}" if silent else f"{action.help} (default: %(default)s)"


class Several(argparse.Action):
    """Values of an option that may be given again; the first on the command line replaces those of a --config file."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), *values])


class Parser(arguments.Parser, HfArgumentParser):  # type: ignore[misc]
    """A flag for every field of some dataclasses, and --config."""

    def __init__(self, *groups: Any, **options: Any) -> None:
        super().__init__(groups, formatter_class=Help, **options)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # which has the help of what it turns off
                action.help = f"turn off --{action.dest.replace('_', '-')}"
        self.add_argument("--config", type=Path, help="YAML or JSON file of options by name; flags win")

    def read(self, given: Sequence[str]) -> tuple[Any, ...]:
        """An instance of every dataclass, and the namespace of all other arguments.

        Raises:
            ValueError: a --config file, or an option, that is wrong.
        """
        early = arguments.Parser(prog=self.prog, add_help=False)
        early.add_argument("--config", type=Path)
        path = early.parse_known_args(given)[0].config
        if path is not None:
            self._take_defaults(path)
        *found, unknown = self.parse_args_into_dataclasses(
            self._apart(given), look_for_args_file=False, return_remaining_strings=True
        )
        self.refuse(unknown)
        return tuple(found)

    def _apart(self, given: Sequence[str]) -> list[str]:
        """A switch takes the argument behind it only where that can be its value: it may be OUTPUT."""
        switches = {name: action for action in self._actions if action.nargs == "?" for name in action.option_strings}
        return [
            f"{argument}=true" if argument in switches and not _fits(switches[argument], after) else argument
            for argument, after in zip(given, [*given[1:], ""], strict=False)
        ]

    def _take_defaults(self, path: Path) -> None:
        actions = {action.dest: action for action in reversed(self._actions) if action.option_strings}
        names = [name for name in actions if name not in ("help", "config")]
        for name, value in _options(path):
            if name.replace("-", "_") not in names:
                known = arguments.nearest(name.replace("-", "_"), names)
                raise ValueError(f"config must hold options of {self.prog}, got {name!r} in {str(path)!r}{known}")
            action = actions[name.replace("-", "_")]
            try:
                action.default = _default(action, value)
            except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
                raise ValueError(f"{name} is wrong in {str(path)!r}: {error}") from error
            action.required = False


def not_empty(text: str) -> str:
    """The type of an argument that is a path, as `check_not_empty` is for options."""
    if not text:
        raise argparse.ArgumentTypeError("it must not be empty")
    return text


def _fits(switch: argparse.Action, text: str) -> bool:
    try:
        return callable(switch.type) and switch.type(text) is not None
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False


def _options(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """Name and value of all options that a file gives."""
    if not path.is_file():
        raise ValueError(f"config must be a file, got {str(path)!r}")
    try:
        loader = yaml.SafeLoader(path.read_bytes())  # JSON is YAML
        node = loader.get_single_node()
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"config must be YAML or JSON, got {str(path)!r}: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        kind = "nothing" if node is None else {"sequence": "list"}.get(node.id, node.id)
        raise ValueError(f"config must hold options by name, got {kind} in {str(path)!r}")
    names = [str(name.value) for name, _ in node.value]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"config must hold an option once, got {min(twice)!r} again in {str(path)!r}")
    return ((name, value) for name, (_, value) in zip(names, node.value, strict=True) if value.tag != NOTHING)


def _default(action: argparse.Action, node: yaml.Node) -> Any:
    """What a flag with this value would give. Words and numbers are taken as they are written."""
    if isinstance(node, yaml.SequenceNode):
        if action.nargs != "+":
            raise ValueError("it must be one value, got a list")
        if any(each.tag == NOTHING for each in node.value):
            raise ValueError("it must be a list of values, got nothing for one")
        return [_converted(action, each) for each in node.value]
    if action.nargs == "?" and node.tag == TRUTH:
        return action.const if yaml.SafeLoader.bool_values[node.value.lower()] else False
    value = _converted(action, node)
    return [value] if action.nargs == "+" else value


def _converted(action: argparse.Action, node: yaml.Node) -> Any:
    text = node.value if isinstance(node, yaml.ScalarNode) else json.dumps(_plain(node))
    value = action.type(text) if callable(action.type) else text
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"it must be one of {', '.join(map(str, action.choices))}, got {text!r}")
    return value


def _plain(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)
