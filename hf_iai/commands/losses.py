"""How training under `hf-iai` reports its loss."""

import sys

from transformers import PrinterCallback, Trainer, TrainerCallback


class LossPrinter(TrainerCallback):
    """Prints the training loss whenever it is logged, and nothing else."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            print(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}")


def print_losses(trainer: Trainer) -> None:
    """Without a terminal, where no progress bar shows the logs, print the losses in place of whole dictionaries."""
    if not sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LossPrinter())
