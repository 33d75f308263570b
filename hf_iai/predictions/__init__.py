"""What may be answered, and a query's own prediction of it (regime `implicit`)."""
