"""A digest of the source of a user's grader, so that scores of a changed grader aren't mixed with old ones."""

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

from ..config.user_code import import_object


def hash_grader_source(path: str | None) -> str | None:
    """A digest of the files that name and define a grader. Other modules that it imports are not part of it.

    Args:
        path: `package.module:function`; None: math-verify.

    Returns:
        12 hexadecimal digits; None for math-verify, and if there is no source, as for a function written in C.

    Raises:
        ConfigError: the grader can't be imported.
    """
    if path is None:
        return None
    function = import_object(path, "grader")
    files = {_source_file(sys.modules[path.split(":")[0]]), _source_file(inspect.unwrap(function))} - {None}
    digest = hashlib.sha256()
    for content in sorted(Path(str(file)).read_bytes() for file in files):
        digest.update(content)
    return digest.hexdigest()[:12] if files else None


def _source_file(thing: Any) -> str | None:
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:  # written in C, or an object with __call__
        return None
    return file if file is not None and Path(file).is_file() else None
