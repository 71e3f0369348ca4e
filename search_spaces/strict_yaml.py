"""Strict reader of user-written YAML: recipes, search spaces, tables, cluster files, single values.

The reader extends PyYAML's safe loader. It rejects valid YAML that is probably a mistake or an attack: duplicate keys,
dates, tags of types other than plain data, exponential alias expansion, deep nesting, and huge files.
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 1024  # per file; the largest shipped file has 20 KiB
MAX_NODES = 10_000  # keys and values per document, with aliases expanded
MAX_DEPTH = 40  # of nested mappings and lists
MAX_DIGITS = 100  # per number
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_CONVERTED = _NUMBERS | {"tag:yaml.org,2002:bool"}  # types whose conversion by PyYAML can fail
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "merge")}


def read_mapping(path: Path, limited: bool = True) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        path: YAML file.
        limited: Reject files with more than `MAX_BYTES` bytes or `MAX_NODES` nodes. Use False for files that linflab
            has written: then the number of bytes is not limited, and only nodes that aliases repeat count as nodes.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If the file cannot be opened.
        ValueError: If the file is not a regular file, is too large, or is not a valid mapping in UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file; use a YAML text file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1) if limited else file.read()
    if limited and len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB; use a smaller file")
    try:
        return parse_mapping(content.decode("utf-8-sig"), limited)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text; save the file as UTF-8") from None


def parse_mapping(text: str, limited: bool = True) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Args:
        text: YAML text.
        limited: Reject text with more than `MAX_NODES` nodes. If False, count only nodes that aliases repeat.

    Raises:
        ValueError: If the text is not valid plain data, not a mapping, or has a key that is not text.
    """
    tree = parse(text, limited)
    if not isinstance(tree, dict):
        content = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ValueError(f"it contains {content}; must be a mapping of names to values")
    _check_keys(tree, "")
    return tree


def parse(text: str, limited: bool = True) -> Any:
    """Return the plain data in a YAML text: mappings, lists, text, numbers, true, false and null.

    Args:
        text: YAML text.
        limited: Reject text with more than `MAX_NODES` nodes. If False, count only nodes that aliases repeat.

    Raises:
        ValueError: If the text is not YAML or not plain data; the message names the key and the line.
    """
    loader = None
    try:
        loader = _Loader(text, limited)
        return loader.get_single_data()
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels; use fewer levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{location}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_keys(tree: Mapping[Any, Any], prefix: str) -> None:
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"{prefix}{key}: the key has type {type(key).__name__}, not text; put it in quotes")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                _check_keys(one, f"{prefix}{key}.")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the checks of this module, which run before data is constructed."""

    def __init__(self, text: str, limited: bool) -> None:
        super().__init__(text)
        self.limited = limited
        self.path: list[str] = []  # keys and indices of the current node
        self.sizes: dict[int, tuple[int, int]] = {}  # node id: number of nodes and levels with aliases expanded
        self.total = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if isinstance(index, yaml.ScalarNode):
            self.path.append(str(index.value))
        elif isinstance(parent, yaml.SequenceNode):
            self.path.append(str(index))
        else:
            self.path.append("")  # the document, or a key
        if len(self.path) > MAX_DEPTH + 1:
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels; use fewer levels")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self.sizes:
            raise self._error("contains itself through an alias; remove the alias")
        if not is_alias:
            self.sizes[id(node)] = self._measure(node)
        size, depth = self.sizes[id(node)]
        self.total += size if is_alias else int(self.limited)
        if self.total > MAX_NODES:
            raise self._error(f"has more than {MAX_NODES} keys and values; use fewer keys, values and aliases")
        if len(self.path) + depth > MAX_DEPTH + 1:
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels; use fewer levels")
        self.path.pop()
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        self._check_tag(node)
        if node.tag in _NUMBERS and ":" in node.value:  # 1:30 is 90 in YAML 1.1
            raise self._error("would be read as a base-60 number; put it in quotes")
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise self._error(f"has more than {MAX_DIGITS} digits; use fewer")
        if node.tag in _CONVERTED:
            try:
                self.yaml_constructors[node.tag](self, node)
            except (ValueError, LookupError):  # an explicit tag that does not fit: `!!bool maybe`
                raise self._error(f"is not a valid {node.tag.rpartition(':')[2]}; remove its tag") from None
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in node.value):
            raise self._error("contains a character that is not valid text; remove it")
        return node

    def compose_sequence_node(self, anchor: Any) -> Any:
        node = super().compose_sequence_node(anchor)
        self._check_tag(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        self._check_tag(node)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error("has a mapping or list as a key; use text")
            if (key.tag, key.value) in keys:
                raise self._error(f"duplicate key {key.value}; keep one", key.value, key.start_mark.line)
            keys.add((key.tag, key.value))
        return node

    def _check_tag(self, node: Any) -> None:
        if node.tag == "tag:yaml.org,2002:timestamp":
            raise self._error("is a date; put it in quotes")
        if node.tag not in _PLAIN:
            raise self._error(f"tag {node.tag} is not supported; use text, numbers, booleans, null, lists, mappings")

    def _measure(self, node: Any) -> tuple[int, int]:
        """Return the numbers of nodes and levels of a complete node, with aliases expanded."""
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(one,) for one in node.value]
        parts = [self.sizes[id(part)] for pair in pairs for part in pair]
        return 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=-1)

    def _error(self, problem: str, key: str = "", line: int | None = None) -> ValueError:
        path = ".".join(filter(None, [*self.path, key])) or "the document"
        path = path if len(path) <= 60 else f"{path[:57]}..."
        number = (self.line if line is None else line) + 1
        return ValueError(f"{path} (line {number}): {problem}")
