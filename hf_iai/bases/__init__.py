"""The pretrained models that states are read behind: decoders, recurrent ones, encoders, and given vectors."""
