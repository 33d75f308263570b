"""Scripts for maintainers: the base, the cards, publishing, comparing trees."""
