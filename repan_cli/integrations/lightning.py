"""A callback for Lightning: `Trainer(callbacks=[RepanCallback(epochs=[10, 20])])`. Needs the extra `lightning`."""

from __future__ import annotations

from typing import Any

from repan_cli.integrations.restarts import Restarted, Restarts
from repan_cli.system.packages import need

need("repan_cli.integrations.lightning", "lightning")

from lightning.pytorch import Callback  # noqa: E402 (there is a clearer error where it is missing)


class RepanCallback(Callback):
    """Merge and regrow the blocks of a module before some epochs, in place; `restarts` records each restart.

    Call `repan_cli.expand` on the network before the trainer begins. Calibration images are drawn from the training
    data; each process draws its share. Lightning's checkpoints hold everything that a run needs to resume anywhere.

    Args:
        epochs: the epochs, counted from 0, before which blocks restart.
        settings: as for `integrations.restarts.Restarts`: `rule`, `attach`, `attach_epochs`, `momentum`, `network` and
            others.
    """

    def __init__(self, epochs: tuple[int, ...] | list[int], **settings: Any) -> None:
        self.settings = Restarts(tuple(epochs), **settings)
        self.done: list[int] = []
        self.restarts: list[Restarted] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a model without blocks before the first step; a run that does not resume has restarted nothing yet."""
        self.settings.network_in(pl_module)
        if trainer.ckpt_path is None:
            self.done.clear()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        if epoch in self.done:  # before a stop in the middle of this epoch
            return
        found = self.settings.before_epoch(epoch, pl_module, trainer.optimizers, trainer.train_dataloader)
        if found is not None:
            self.done.append(epoch)
            self.restarts.append(found)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.settings.before_step(trainer.current_epoch + batch_idx / trainer.num_training_batches, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"done": list(self.done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = list(state_dict["done"])
