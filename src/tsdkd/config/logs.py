"""The library's loggers: on the first process only where all processes of a run come to the same message."""

import logging
import os


class _MainProcessLogger(logging.LoggerAdapter):
    def isEnabledFor(self, level: int) -> bool:
        return os.environ.get("RANK", "0") == "0" and super().isEnabledFor(level)


def get_logger(name: str) -> logging.LoggerAdapter:
    """The logger of a module; unlike accelerate's it needs no process group, and adds nothing to the message."""
    return _MainProcessLogger(logging.getLogger(name), {})


def set_log_level(name: str) -> None:
    """Set the level of the library's messages to a run's `log_level`; "passive" changes nothing."""
    if name != "passive":
        logging.getLogger("tsdkd").setLevel(name.upper())
