"""Lightning's strategy for a model that Megatron places and connects."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy


class MegatronPlacement(SingleDeviceStrategy):
    """One device per process, and hands off the weights.

    The stock strategy moves the model to its device at the start and to the CPU at the end of each run. Megatron's
    optimizer holds views into its own buffers, and a checkpoint is gathered on the device after the run.
    """

    def model_to_device(self) -> None:
        """Nothing: the model was built where it belongs."""

    def teardown(self) -> None:
        """Closes what Lightning opened, and leaves the weights where they are."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
