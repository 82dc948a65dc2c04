"""The audit: can an explanation be believed? One question a module, pure functions over a small interface."""
