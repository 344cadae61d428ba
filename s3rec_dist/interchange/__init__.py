"""Other programs' models and settings: what comes in from them, and what goes out to them."""
