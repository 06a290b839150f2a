"""Training loops. `training_scripts/` parses arguments and calls them."""
