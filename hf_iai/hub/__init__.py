"""Hub: model cards, and the published adapters."""
