"""Lightning's strategy for a model that Megatron distributes."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy


class MegatronPlacement(SingleDeviceStrategy):
    """One device per process, without moving the weights.

    `SingleDeviceStrategy` moves the model to its device at the start and to the CPU at the end of each run. Megatron's
    optimizer holds views into its own buffers, and a checkpoint is gathered on the device after the run.
    """

    def model_to_device(self) -> None:
        """Do nothing: the model was built on its device."""

    def teardown(self) -> None:
        """Tear down Lightning's plugins without moving the weights."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
