"""The NeMo model class, and what the commands do with it."""

from nemo_popsd.model.purified_opsd import PurifiedOPSDModel

__all__ = ["PurifiedOPSDModel"]
