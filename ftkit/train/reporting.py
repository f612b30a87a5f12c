"""Where else a training is told of, by the trainer's own callbacks: TensorBoard, W&B and their like, where the recipe asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftkit.errors import ToolMissingError

TENSORBOARD = "tensorboard"  # its files, in the training's folder
PACKAGES = {  # module → package, by transformers' name; one of the modules is enough
    "tensorboard": {"tensorboard": "tensorboard", "tensorboardX": "tensorboardX"},
    "wandb": {"wandb": "wandb"},
    "trackio": {"trackio": "trackio"},
    "mlflow": {"mlflow": "mlflow"},
    "comet_ml": {"comet_ml": "comet-ml"},
    "clearml": {"clearml": "clearml"},
    "dvclive": {"dvclive": "dvclive"},
    "swanlab": {"swanlab": "swanlab"},
}


def refuse_missing_reporters(report_to: Sequence[str]) -> None:
    """Raise ToolMissingError where a package is not installed that the recipe wants to be told."""
    missing = [name for name in report_to if not any(find_spec(module) for module in PACKAGES[name])]
    if missing:
        packages = " ".join(next(iter(PACKAGES[name].values())) for name in missing)
        raise ToolMissingError(f"training.report_to: not installed: {', '.join(missing)}.", f"pip install {packages}")


@contextmanager
def reporting(trainer: Any, folder: Path) -> Iterator[None]:
    """TensorBoard's files go into the training's folder, not among its checkpoints, unless TENSORBOARD_LOGGING_DIR names another.

    What these packages print goes to stderr: stdout is for results.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / TENSORBOARD)
    if not trainer.args.report_to:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
