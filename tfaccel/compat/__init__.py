"""Other libraries' names on tfaccel's mechanisms, for code that is moved to Keras 3."""
