"""How well an artifact predicts text, alone and beside a reference; and how fast it is."""
