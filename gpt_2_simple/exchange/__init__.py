"""Models of other programs in and out: Hugging Face transformers, llama.cpp, Ollama."""
