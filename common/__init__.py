"""The data and config layer that both engines share: NumPy and plain Python, no MLX, no torch.

`from common import load_config, train` is the Python interface, common/interface.py; it is imported when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.interface import TrainedRun, load_config, train

__all__ = ["TrainedRun", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from common import interface

    return getattr(interface, name)
