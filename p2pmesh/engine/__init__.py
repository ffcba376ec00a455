"""llama.cpp's server: found, built, started, watched."""
