"""The NeMo model class, and how its parts are built from a configuration."""

from nemo_popsd.model.purified_opsd import PurifiedOPSDModel

__all__ = ["PurifiedOPSDModel"]
