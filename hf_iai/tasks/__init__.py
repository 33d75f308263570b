"""The kinds of task: what a chunk and a query are, what is learned, how it is measured."""
