"""Plan files: a question to the planner in YAML, with the keys of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megamoe.catalog.wording import nearest
from megamoe.paths import write_whole
from megamoe.planner.question import Question, ask, keys_of_questions

NEEDED = {"model": "deepseek-v4-pro", "hardware": "gb200"}  # so that keys can be checked that do not name them


def read_plan(path: Path) -> dict[str, Any]:
    """The keys of a file, checked. ValueError names the file, the line and what is wrong there."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        keys = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(keys, dict):
        raise ValueError(f"{path} holds no keys; a plan starts with model: and hardware:")
    _check(path, node, keys)
    return {**keys, "set": ask({**NEEDED, "set": keys.get("set", ())}).settings}


def _check(path: Path, node: yaml.MappingNode, keys: dict[Any, Any]) -> None:
    """Each key by itself, so that the line is known."""
    seen: set[str] = set()
    for key_node, _ in node.value:
        key, where = str(key_node.value), f"{path} line {key_node.start_mark.line + 1}"
        if key in seen:
            raise ValueError(f"{where}: {key} is given twice")
        if key not in keys_of_questions():
            raise ValueError(f"{where}: unknown key '{key}'; {nearest(key, keys_of_questions())}")
        seen.add(key)
        try:
            ask({**NEEDED, key: keys[key]})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def write_plan(question: Question, path: Path, comments: list[str]) -> None:
    """A file that --config reads, without what is as it would be anyway. OSError where it cannot be written."""
    keys = question.model_dump(exclude_defaults=True, by_alias=True, mode="json")
    lines = [f"# {comment}" for comment in comments]
    body = yaml.safe_dump(keys, sort_keys=False, default_flow_style=False, allow_unicode=True)
    write_whole(path, "\n".join([*lines, body]))
