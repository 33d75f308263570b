"""Reading documents: code, novels, Markov chains."""
