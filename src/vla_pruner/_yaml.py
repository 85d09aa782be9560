"""YAML that people write: read without running anything, refused where it contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vla_pruner._short import cut, word


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice in one mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1 and name != "<<"}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{word(twice[0])} is said twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: it cannot be read, is not YAML, is nested too deeply, or says a name twice.
    """
    try:
        return yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {cut(str(error), 400)}") from error
