"""For maintainers: the base, the cards, publishing, comparing trees."""
