"""Export of task states for use without hf_iai: as plain PEFT adapters, or as plain transformers classifiers."""
