"""`lance-mlx serve`: an OpenAI-compatible API and a page, over one model and one queue; needs the extra `serve`."""
