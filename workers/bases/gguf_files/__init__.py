"""What a GGUF file says of a model: names, hyperparameters, vocabulary, types; by the `gguf` package of llama.cpp."""
