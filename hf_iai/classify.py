"""`hf_iai.classify`: a file of labelled texts becomes a classifier; see `hf_iai.commands.classify`."""

from .commands.classify import accuracy, classify, installed_encoder, load_reader
from .data.tables import labelled_rows as read_rows

__all__ = ["accuracy", "classify", "installed_encoder", "load_reader", "read_rows"]
