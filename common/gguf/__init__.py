"""GGUF, llama.cpp's format of models: its words, read into Hugging Face's and, for exports, written."""
