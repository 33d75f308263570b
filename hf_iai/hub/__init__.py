"""What lies on the Hub: model cards, and the published adapters."""
