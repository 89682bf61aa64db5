"""How the models in `data/` were made: the text, the training loop, and what it watches."""
