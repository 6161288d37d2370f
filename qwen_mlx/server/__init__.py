"""HTTP: OpenAI's and llama.cpp's interfaces, and a page, in front of one model. Needs the extra `server`."""
