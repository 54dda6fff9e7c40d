"""The NeMo model class, and the construction of its parts from a configuration."""

from nemo_popsd.model.purified_opsd import PurifiedOPSDModel

__all__ = ["PurifiedOPSDModel"]
