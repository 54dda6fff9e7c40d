"""Lightning leaves the weights where Megatron put them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_popsd.model.strategy import MegatronPlacement


class Still(LightningModule):
    """Counts who moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.moved: list[str] = []

    def _apply(self, *args: object, **kwargs: object) -> Still:  # type: ignore[override]
        self.moved.append("moved")
        return self

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(strategy: object) -> list[str]:
    model = Still()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,  # type: ignore[arg-type]
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader([0, 1]))
    return model.moved


def test_weights_stay_where_they_are() -> None:
    assert run("auto") != []  # what Lightning does by itself
    assert run(MegatronPlacement(device=torch.device("cpu"))) == []
