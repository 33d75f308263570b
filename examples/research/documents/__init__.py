"""Reading documents: source code, novels, Markov chains."""
