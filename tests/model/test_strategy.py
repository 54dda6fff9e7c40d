"""`MegatronPlacement` never moves the weights."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_popsd.model.strategy import MegatronPlacement


class RecordsMoves(LightningModule):
    """Records each call that would move its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.moved: list[str] = []

    def _apply(self, *args: object, **kwargs: object) -> RecordsMoves:  # type: ignore[override]
        self.moved.append("moved")
        return self

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(strategy: object) -> list[str]:
    model = RecordsMoves()
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


def test_weights_are_not_moved() -> None:
    assert run("auto") != []  # Lightning's own strategy moves them
    assert run(MegatronPlacement(device=torch.device("cpu"))) == []
