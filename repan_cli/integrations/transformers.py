"""A callback for Hugging Face's Trainer: `Trainer(callbacks=[RepanCallback(epochs=[10, 20])])`.

Needs the extra `transformers`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from repan_cli.integrations.restarts import Restarted, Restarts
from repan_cli.system.packages import need

need("repan_cli.integrations.transformers", "transformers", "accelerate")

from transformers import TrainerCallback  # noqa: E402 (there is a clearer error where it is missing)
from transformers.trainer_callback import ExportableState  # noqa: E402

WHOLE = 1e-6
"""The largest distance of the epoch number from an integer at the start of an epoch."""


class RepanCallback(TrainerCallback, ExportableState):
    """Merge and regrow the blocks of a model before some epochs, in place; `restarts` records each restart.

    Call `repan_cli.expand` on the network before the trainer begins. Calibration images are drawn from the training
    data; each process draws its share. A run that resumes in the middle of an epoch knows from its position that the
    restart before that epoch is done.

    Args:
        epochs: the epochs, counted from 0, before which blocks restart.
        settings: as for `integrations.restarts.Restarts`: `rule`, `attach`, `attach_epochs`, `momentum`, `network` and
            others.
    """

    def __init__(self, epochs: tuple[int, ...] | list[int], **settings: Any) -> None:
        self.settings = Restarts(tuple(epochs), **settings)
        self.restarts: list[Restarted] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """Refuse a model without blocks before the first step."""
        self.settings.network_in(found["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        here = state.epoch or 0.0
        if abs(here - round(here)) > WHOLE:  # resumed in the middle of this epoch
            return
        optimizers = [found["optimizer"]]
        done = self.settings.before_epoch(round(here), found["model"], optimizers, found["train_dataloader"])
        if done is not None:
            self.restarts.append(done)

    def on_step_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        self.settings.before_step(state.epoch or 0.0, found["model"])

    def state(self) -> dict[str, Any]:
        """Return the state for the trainer's checkpoints: only the arguments."""
        arguments = dataclasses.asdict(self.settings)
        return {"args": {**arguments, "epochs": list(self.settings.epochs)}, "attributes": {}}
