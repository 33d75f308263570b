"""Task states for those who do not have hf_iai: plain PEFT adapters and plain transformers classifiers."""
