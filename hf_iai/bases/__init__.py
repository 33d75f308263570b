"""Wrappers of the pretrained models: decoders, models with recurrent layers, encoders, and a base for given vectors."""
